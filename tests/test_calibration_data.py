import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TEXT

from byte_tokenizer import byte_tokenizer
from hf_compressm.calibration_data import DataArguments, calibration_batches, collate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def load(checkpoint, data, count=2, **options):
    options = {"sequence_length": 32, "batch_size": 4} | options
    return calibration_batches(checkpoint, DataArguments(str(data), **options), count, seed=0)


def test_text_is_tokenised_and_cut_and_some_of_it_is_held_out(checkpoint):
    batches, held_out = load(checkpoint, TEXT)
    assert [len(batches), len(held_out)] == [2, 2]
    rows = torch.cat([batch["input_ids"] for batch in batches + held_out])
    assert rows.shape == (16, 32)
    assert torch.equal(batches[0]["labels"], batches[0]["input_ids"])
    text = TEXT.read_bytes()
    assert all(bytes(row.tolist()) in text for row in rows if row.max() < 256)
    assert len({bytes(row.tolist()) for row in rows if row.max() < 256}) > 12  # no sequence twice
    again, _ = load(checkpoint, TEXT)
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])


def test_tables_of_texts_tokens_and_numbers(checkpoint, tmp_path):
    Dataset.from_dict({"story": ["to be or not to be " * 20] * 4}).to_parquet(tmp_path / "texts.parquet")
    batches, _ = load(checkpoint, tmp_path / "texts.parquet", text_column="story")
    assert batches[0]["input_ids"].shape == (4, 32)
    Dataset.from_dict({"input_ids": [[1, 2, 3], [4] * 50] * 4}).to_json(tmp_path / "tokens.jsonl")
    batches, _ = load(checkpoint, tmp_path / "tokens.jsonl")
    assert batches[0]["input_ids"].shape == (4, 32)  # cut
    assert set(batches[0]["labels"][batches[0]["attention_mask"] == 0].tolist()) == {-100}
    values = [[float(i)] * 10 for i in range(8)]
    Dataset.from_dict({"input_values": values, "label": list(range(8))}).to_parquet(tmp_path / "numbers.parquet")
    (batch,), _ = load(checkpoint, tmp_path / "numbers.parquet", count=1)
    assert batch["input_values"].dtype == torch.float32
    assert torch.equal(batch["input_values"][:, 0].long(), batch["labels"])


def test_labels_and_padding_of_a_table_are_kept(checkpoint, tmp_path):
    """Of instructions, say, whose answers alone count."""
    columns = {"input_ids": [1, 2, 3, 4, 0], "labels": [-100, -100, 3, 4, -100], "attention_mask": [1, 1, 1, 1, 0]}
    Dataset.from_dict({name: [values] * 8 for name, values in columns.items()}).to_json(tmp_path / "tokens.jsonl")
    (batch, *_), _ = load(checkpoint, tmp_path / "tokens.jsonl")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]] * 4
    assert batch["labels"].tolist() == [[-100, -100, 3, 4]] * 4
    (batch, *_), _ = load(checkpoint, tmp_path / "tokens.jsonl", sequence_length=3)
    assert batch["labels"].tolist() == [[-100, -100, 3]] * 4


def test_padding_is_masked_and_channels_are_kept():
    rows = [{"input_values": np.ones((length, 2)), "labels": None} for length in (2, 3)]
    batch = collate(rows)
    assert batch["input_values"].shape == (2, 3, 2)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert "labels" not in batch


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("nothing.txt", {}, "there is no file nothing.txt"),
        ("text.md", {}, "expected a file .txt, .parquet"),
        ("table.parquet", {}, "name another with --text_column"),
        ("text.txt", {"sequence_length": 4096}, "less than one batch of 4"),
    ],
)
def test_errors_say_what_to_do(checkpoint, tmp_path, monkeypatch, data, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.md").write_text("words")
    (tmp_path / "text.txt").write_text("words")
    Dataset.from_dict({"other": ["words"]}).to_parquet("table.parquet")
    with pytest.raises(ValueError, match=message):
        load(checkpoint, data, **options)


def test_a_checkpoint_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        load(str(tmp_path), TEXT)
    with pytest.raises(ValueError, match="--batch_size is a number of at least 1"):
        DataArguments("text.txt", batch_size=0)
