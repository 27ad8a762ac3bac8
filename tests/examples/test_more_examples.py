"""The examples that start from a finished model, and the one that takes reductions back, at a tiny size."""

import re

import pytest
from tiny import TEXT, tiny_lm
from transformers import AutoConfig

import compress_checkpoint
import finetune_lora
import rollback
from byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a small model with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    lm = tiny_lm(state_size=16)
    lm.resize_token_embeddings(258)
    lm.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT.read_bytes()[:20_000])
    return ["--train_file", str(path), "--sequence_length", "32"]


def sizes(directory):
    return [layer.state_size for layer in AutoConfig.from_pretrained(directory).per_layer_config]


def test_a_finished_checkpoint_is_compressed(model, text, tmp_path, capsys):
    compress_checkpoint.main(
        ["--model", str(model), "--output_dir", str(tmp_path), "--max_loss_increase", "0.05", *text]
    )
    before, after = map(float, re.search(r"validation loss ([\d.]+) → ([\d.]+)", capsys.readouterr().out).groups())
    assert max(sizes(tmp_path)) < 16
    assert after < before + 0.1


def test_a_reduced_model_is_fine_tuned_with_lora(model, text, tmp_path, capsys):
    options = ["--max_steps", "15", "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "5e-2"]
    finetune_lora.main(["--model", str(model), "--output_dir", str(tmp_path), *options, *text])
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"validation loss ([\d.]+) → ([\d.]+)", out).groups())
    assert after < before
    again = float(re.search(r"loaded again and merged: ([\d.]+)", out)[1])
    assert abs(again - after) < 1e-3
    assert not (tmp_path / "model.safetensors").exists()


def test_every_reduction_is_judged_by_its_loss(text, tmp_path, capsys):
    tiny = ["--hidden_size", "16", "--state_size", "16", "--learning_rate", "1e-6", "--use_cpu", "true"]
    schedule = ["--max_steps", "30", "--eval_steps", "5", "--start", "10", "--end", "25", "--num_reductions", "3"]
    options = ["--rollback_tolerance", "0", "--disable_tqdm", "true"]
    rollback.main(["--output_dir", str(tmp_path), *tiny, *schedule, *options, *text])
    out = capsys.readouterr().out
    line = re.compile(
        r"^step \d+: states 16 → (\d+), .*; validation loss ([\d.]+) → ([\d.]+): (stays|taken back)", re.M
    )
    size, before, after, verdict = line.search(out).groups()
    assert size == "8"
    assert verdict == ("taken back" if float(after) > float(before) else "stays")
    assert (sizes(tmp_path) == [16, 16]) == (verdict == "taken back")
    assert out.splitlines()[-1].startswith(f"at the end: states {sizes(tmp_path)}")


@pytest.mark.parametrize("example", [compress_checkpoint, finetune_lora])
def test_a_missing_model_is_one_line(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: "):
        example.main(["--model", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "out")])
