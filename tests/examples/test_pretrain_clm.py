"""Data, tokens and options of `pretrain_clm.py`."""

import random

import datasets
import numpy as np
import pytest
from scipy.stats import entropy
from transformers import AutoTokenizer, EvalPrediction

import pretrain_clm
from bpe_tokenizer import bpe_tokenizer
from byte_tokenizer import byte_tokenizer
from metrics import next_token_accuracy


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def random_text(length: int) -> str:
    """Characters from all of Unicode."""
    points = (random.randrange(0x110000) for _ in range(length))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_tokens_are_the_bytes_of_any_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = ["ROMEO:\n  What's  here ?\t\r\n", "\x00\x7f\u2028e\u0301é 漢字 😀 <0x41> Ġ", random_text(5000)]
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts:
            ids = each(text)["input_ids"]
            assert bytes(ids) == text.encode()
            assert each.decode(ids) == text


TEXTS = ["to be or not to be\n", "", "that is the question\n"] * 20


def test_learned_tokens_write_any_text(tmp_path):
    tokenizer = bpe_tokenizer(TEXTS, 280)
    assert len(tokenizer) == 280
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2
    tokenizer.save_pretrained(tmp_path)
    reloaded = pretrain_clm.load_tokenizer(arguments(tokenizer=str(tmp_path)))
    texts = [*TEXTS, "ROMEO:\n  What's  here ?\t\r\n", "\x00\x7f\u2028e\u0301é 漢字 😀 <0x41> Ġ", random_text(5000)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert reloaded(text)["input_ids"] == ids
    assert (reloaded.eos_token_id, reloaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_the_same_text_teaches_the_same_tokens():
    first, second = (bpe_tokenizer(TEXTS, 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_the_tokenizer_does_not_see_what_validates(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 10, encoding="utf-8")
    assert (
        "".join(pretrain_clm.training_texts(arguments(train_file=str(text), validation_fraction=0.25)))
        == ("0123456789" * 10)[:75]
    )
    both = arguments(train_file=str(text), validation_file=str(text))
    assert list(pretrain_clm.training_texts(both)) == ["0123456789" * 10]


def test_special_tokens_follow_the_bytes(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)
    assert tokenizer.decode([65, 256, 257], skip_special_tokens=True) == "A"


def arguments(**fields) -> pretrain_clm.DataArguments:
    return pretrain_clm.DataArguments(sequence_length=8, **fields)


def test_text_is_cut_in_order_and_its_end_validates(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(97, 123)) * 4)
    train, validation = pretrain_clm.load_sequences(arguments(train_file=str(text)), tokenizer)
    assert (len(train), len(validation)) == (12, 1)
    together = np.concatenate([*train["input_ids"], *validation["input_ids"]])
    assert bytes(together.tolist()) == text.read_bytes()  # 13 x 8 bytes; the end of the text is cut off


def test_parquet_rows_are_joined_by_the_end_of_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {}
    for split, texts in {"train": ["ab", "cde", "fghijkl"], "validation": ["01234567"]}.items():
        files[split] = str(tmp_path / f"{split}.parquet")
        datasets.Dataset.from_dict({"body": texts}).to_parquet(files[split])
    data = arguments(train_file=files["train"], validation_file=files["validation"], text_column="body")
    train, validation = pretrain_clm.load_sequences(data, tokenizer)
    assert [row.tolist() for row in train["input_ids"]] == [[97, 98, 256, 99, 100, 101, 256, 102]]
    assert bytes(validation["input_ids"][0].tolist()) == b"01234567"


def test_entropy_of_single_bytes(tokenizer):
    rows = datasets.Dataset.from_dict({"input_ids": [[97, 97, 97, 98], [99, 98, 97, 256]]}).with_format("numpy")
    text = pretrain_clm.to_bytes(rows, tokenizer)
    assert text == b"aaabcba"
    assert pretrain_clm.entropy(text) == pytest.approx(entropy([4, 2, 1]))


def test_accuracy_of_the_next_token_ignores_what_is_not_predicted():
    labels = np.array([[5, 6, 7, 8], [5, 6, 7, -100]])
    predictions = np.array([[6, 7, 0, 9], [6, 0, -100, 9]])
    assert next_token_accuracy(EvalPrediction(predictions, labels)) == {"accuracy": 3 / 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--train_file", pretrain_clm.__file__], "expected a .txt or .parquet file, found .py"),
        (["--sequence_length", "2000000"], "0 training and 0 validation sequences of 2000000 tokens are too few"),
        (["--tokenizer", "words"], "--tokenizer is 'bytes', 'bpe' or a directory; found 'words'"),
        (["--tokenizer", "bpe", "--vocab_size", "257"], "--vocab_size is at least 258"),
        (["--vocab_size", "300"], "--vocab_size is that of --tokenizer bpe"),
        (["--tolerance", "2"], "`tolerance` is a fraction"),
        (["--tolerance", "0.1", "--target_state_size", "4"], "at most one rank rule"),
        (["--start", "0.5"], "ends before it starts"),
        (["--state_size", "8", "8"], "one for each of the 3 layers; found 2"),
        (["--model_type", "mamba", "--state_size", "8", "8", "8"], "one number for all layers of a stock mamba"),
        (["--config_overrides", "[1]"], "is a JSON object"),
        (["--config_overrides", '{"rmin": 0.5}'], "a mimo_ssm config has no field rmin"),
        (["--config_overrides", '{"r_min": 1.5}'], "expected 0 <= r_min < r_max <= 1"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, options, message):
    with pytest.raises(SystemExit) as stop:
        pretrain_clm.main(["--output_dir", str(tmp_path), *options])
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code
