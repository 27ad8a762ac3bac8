"""The cards in `model_cards/` are those of the files beside them."""

import json
from pathlib import Path

import jsonschema
import pytest
from huggingface_hub import ModelCard

from hf_compressm.hub import PLOT_NAME, Run, build_card

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "model_card_schema.json").read_text())
CARDS = sorted(path.parent for path in (HERE.parents[1] / "model_cards").glob("*/compression_report.json"))


@pytest.mark.parametrize("directory", CARDS, ids=lambda path: path.name)
def test_a_committed_card_is_what_its_files_tell(directory):
    saved = ModelCard.load(directory / "README.md")
    made = build_card(Run.load(directory), plot=PLOT_NAME, has_code=True)
    assert made.content.strip() == saved.content.strip()
    jsonschema.validate(saved.data.to_dict(), SCHEMA)
    assert (directory / PLOT_NAME).stat().st_size > 10_000


def test_there_is_a_card_for_text_pixels_and_sounds():
    assert {path.name for path in CARDS} == {"digits", "spoken-digits", "tinyshakespeare"}
