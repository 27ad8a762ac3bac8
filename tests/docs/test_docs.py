"""The documentation does what it says."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def code_blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_an_architecture_runs(capsys):
    from hf_compressm.reducers import base

    known = dict(base._REDUCERS)
    try:
        exec("\n".join(code_blocks(DOCS / "adding_an_architecture.md")), {"__name__": "example"})
    finally:
        base._REDUCERS.clear()
        base._REDUCERS.update(known)
    before, after = map(int, re.findall(r"\d+", capsys.readouterr().out))
    assert after < before == 24


def test_examples_in_docstrings_run():
    modules = [path for path in (ROOT / "hf_compressm").rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    found = [doctest.testmod(import_module(name)) for name in names]
    assert sum(result.attempted for result in found) >= 20
    assert not any(result.failed for result in found)


def test_every_message_in_troubleshooting_is_one_of_the_code():
    """Quoted messages, with … for what differs, as they stand in the source without line breaks and quotes."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "hf_compressm").rglob("*.py")]
    # adjacent string literals are one string
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(sources))
    messages = re.findall(
        r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(messages) >= 10
    missing = [
        part for message in messages for part in message.split("…") if part.strip() and part.strip() not in code
    ]
    assert not missing


@pytest.mark.parametrize("path", sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")]), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]
