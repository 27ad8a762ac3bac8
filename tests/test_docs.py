"""What the documentation says exists does."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "combinations.md").read_text())))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_the_test_that_a_combination_names_exists(path, name):
    functions = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in {function.name for function in functions}


def test_every_combination_names_a_test_or_says_that_it_was_not_run():
    rows = re.findall(r"^\|(?!-|[^|]*set-up).*\|$", (ROOT / "docs" / "combinations.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if "`tests/" not in row and "not run:" not in row] == []
