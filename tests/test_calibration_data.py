import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TEXT, tiny_lm

from byte_tokenizer import byte_tokenizer
from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification
from hf_compressm.calibration_data import _READERS, DataArguments, calibration_batches, check_fit, collate


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
        ("empty.txt", {}, "empty.txt is empty"),
        ("empty.jsonl", {}, "empty.jsonl is empty"),
        ("binary.txt", {}, "expected a text in UTF-8 in binary.txt"),
        *((f"binary{suffix}", {}, f"cannot read binary{suffix} as {suffix}: ") for suffix in _READERS),
        ("folder", {}, "cannot read the files in folder: .* any data files"),
        ("no-such/dataset", {}, "cannot read no-such/dataset, which is no file, from the Hub: "),
    ],
)
def test_errors_say_what_to_do(checkpoint, tmp_path, monkeypatch, data, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.md").write_text("words")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "folder").mkdir()
    for suffix in (".txt", *_READERS):
        (tmp_path / f"empty{suffix}").touch()
        (tmp_path / f"binary{suffix}").write_bytes(bytes(range(256)) * 50)
    Dataset.from_dict({"other": ["words"]}).to_parquet("table.parquet")
    with pytest.raises(ValueError, match=message):
        load(checkpoint, data, **options)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [3] * 8}, "expected texts in 'text' of .*; found 3"),
        ({"text": [list(range(99))] * 8}, r"expected texts in 'text' of .*; found \[0, 1, 2.{52}\.$"),
        ({"input_ids": [7] * 8}, "expected a sequence of whole numbers in each row of the column input_ids; found 7"),
        ({"input_ids": [[1.5, 2.0]] * 8}, "expected a sequence of whole numbers"),
        ({"input_ids": [[[1, 2]]] * 8}, r"expected a sequence of whole numbers .* input_ids; found \[\[1, 2\]\]"),
        ({"input_ids": [[1] * 99 + [None]] * 8}, r"expected a sequence of whole numbers .* input_ids; found \[nan\]"),
        ({"input_ids": [None, [1, 2]] * 4}, "expected a sequence of whole numbers .* input_ids; found None"),
        (
            {"input_values": [["a", "b"]] * 8},
            "expected a sequence of numbers, .* in each row of the column input_values",
        ),
        ({"input_values": [[0.5, None]] * 8}, r"expected a sequence of numbers, .* input_values; found \[nan\]"),
        ({"input_values": [[[[0.5]]]] * 8}, r"expected a sequence of numbers, .* input_values; found \[\[\[0.5\]\]\]"),
        ({"input_values": [[[1.0], [1.0, 2.0]]] * 8}, "expected a sequence of numbers, or of channels of numbers,"),
        ({"input_values": [[[1.0]], [[1.0, 2.0]]] * 4}, r"expected as many channels in each row .*; found \[1, 2\]"),
        ({"input_ids": [[]] * 8}, "gives 0 sequences"),
        ({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2]] * 8}, "expected labels and attention_mask as long as"),
        ({"input_ids": [[1, 2, 3]] * 8, "attention_mask": [[1]] * 8}, "expected labels and attention_mask as long as"),
        (
            {"input_ids": [[1, 2]] * 8, "attention_mask": [[1, 1], None] * 4},
            "zeros and ones .* attention_mask; found None",
        ),
        ({"input_ids": [[1, 2]] * 8, "attention_mask": [[1, None]] * 8}, r"attention_mask; found \[nan\]"),
        ({"input_ids": [[1, 2]] * 8, "attention_mask": [1] * 8}, "zeros and ones .* attention_mask; found 1"),
        ({"input_values": [[0.5]] * 8, "label": ["a"] * 8}, "expected a number, or .* column label; found 'a'"),
        ({"input_values": [[0.5]] * 8, "label": [1, None] * 4}, r"expected a number, .* label; found \[nan\]"),
        ({"input_ids": [[1, 2]] * 8, "labels": [[1, None]] * 8}, r"expected a number, .* labels; found \[nan\]"),
        ({"input_ids": [[1, 2]] * 8, "labels": [None, [1, 2]] * 4}, "expected a number, .* labels; found None"),
    ],
)
def test_columns_of_another_kind_are_refused(checkpoint, tmp_path, columns, message):
    Dataset.from_dict(columns).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=message):
        load(checkpoint, tmp_path / "table.parquet")


def test_empty_rows_among_others_are_left_out(checkpoint, tmp_path):
    Dataset.from_dict({"input_ids": [[], [1, 2]] * 4}).to_parquet(tmp_path / "table.parquet")
    (batch,), _ = load(checkpoint, tmp_path / "table.parquet")
    assert batch["input_ids"].tolist() == [[1, 2]] * 4


LM = tiny_lm()
NUMBERS, CLASSES = (
    MimoSSMForSequenceClassification(MimoSSMConfig(**options, hidden_size=8, num_hidden_layers=1, num_labels=3))
    for options in ({"input_size": 1}, {"vocab_size": 9})
)
IDS, CHANNEL = torch.tensor([[0, 8], [1, 5]]), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (LM, {"input_ids": IDS + 248}, "expected input_ids below 256, .*found 256. Save the tokenizer"),
        (LM, {"input_ids": IDS - 1}, "expected input_ids below 256, .*found -1"),
        (LM, {"input_ids": IDS, "labels": IDS + 300}, "expected labels below 256, .*found 300"),
        (LM, {"input_values": CHANNEL}, "expected input_ids for this model in some.txt; found input_values"),
        (NUMBERS, {"input_ids": IDS}, "expected input_values for this model in some.txt; found input_ids"),
        (NUMBERS, {"input_values": CHANNEL, "labels": torch.tensor([0, 3])}, "expected labels below 3, .*found 3"),
        (CLASSES, {"input_ids": IDS + 1, "labels": IDS[0]}, "expected input_ids below 9"),
        (CLASSES, {"input_ids": IDS, "labels": IDS}, "expected a label for each sequence of some.txt; found none"),
    ],
)
def test_data_that_the_model_cannot_read_are_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        check_fit(model, [batch], "some.txt")


def test_data_that_the_model_can_read_are_not():
    ignored = torch.tensor([[-100, 255], [0, -100]])
    check_fit(LM, [{"input_ids": IDS + 247, "labels": ignored}], "some.txt")
    check_fit(NUMBERS, [{"input_values": CHANNEL, "labels": torch.tensor([0, 2])}], "some.txt")
    check_fit(NUMBERS, [{"input_values": CHANNEL}], "some.txt")
    check_fit(CLASSES, [{"input_ids": IDS, "labels": torch.tensor([2, 0])}], "some.txt")


def test_a_checkpoint_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer in"):
        load(str(tmp_path), TEXT)
    with pytest.raises(ValueError, match="--batch_size is a number of at least 1"):
        DataArguments("text.txt", batch_size=0)
