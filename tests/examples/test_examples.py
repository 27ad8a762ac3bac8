"""The examples, run as a user runs them, at a tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_compressm import CompressionReport

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--hidden_size", "16", "--state_size", "16", "--num_hidden_layers", "2", "--target_state_size", "4"]
QUICK = ["--learning_rate", "1e-2", "--disable_tqdm", "true"]


def run(env: dict[str, str], script: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / script), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def state_sizes(directory: Path) -> list[int]:
    return [layer.state_size for layer in AutoConfig.from_pretrained(directory).per_layer_config]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, repo_env):
    """A model that `pretrain_clm.py` saved, and what it printed."""
    directory = tmp_path_factory.mktemp("clm")
    text = directory / "text.txt"
    text.write_bytes((EXAMPLES / "data" / "tinyshakespeare.txt").read_bytes()[:50_000])
    where = ["--train_file", str(text), "--output_dir", str(directory / "model")]
    options = ["--sequence_length", "32", "--max_steps", "60", "--eval_strategy", "no"]
    done = run(repo_env, "pretrain_clm.py", *where, *options, *TINY, *QUICK)
    assert done.returncode == 0, done.stderr
    return directory / "model", done.stdout


@pytest.fixture(scope="module")
def table(language_model):
    """The table at the end: the numbers before, after and at the end, by row."""
    cells = (line.split("  ") for line in language_model[1].splitlines())
    rows = ([cell.strip() for cell in line if cell.strip()] for line in cells)
    return {label: numbers for label, *numbers in (row for row in rows if len(row) > 1)}


def test_pretraining_saves_a_reduced_model(language_model):
    directory, _ = language_model
    assert state_sizes(directory) == [4, 4]
    report = CompressionReport.load(directory)
    assert [event.step for event in report.events] == [2, 3, 4, 6]
    assert [layer.before for layer in report.events[0].layers] == [16, 16]
    assert [layer.after for layer in report.events[-1].layers] == [4, 4]


def test_pretraining_ends_with_a_table_of_what_changed(language_model, table):
    model = AutoModelForCausalLM.from_pretrained(language_model[0])
    assert table["state size, layer 0"] == table["state size, layer 1"] == ["16", "4"]
    before, after = (int(number.replace(",", "")) for number in table["parameters"])
    assert after == model.num_parameters()
    # nu, theta, and the complex B and C of the 12 states that each layer lost
    assert before - after == 2 * 12 * (2 + 4 * 16)
    assert len(table["training step, median (ms)"]) == 2


def test_pretraining_beats_the_entropy_of_single_bytes(table):
    untrained, reduced, final = map(float, table["validation loss (nats per byte)"])
    assert final < min(untrained, reduced)
    assert final < float(table["entropy of single bytes (nats)"][0])


def test_a_new_process_generates(language_model, repo_env):
    done = run(
        repo_env, "generate.py", "--model", str(language_model[0]), "--prompt", "KING:", "--max_new_tokens", "9"
    )
    assert done.returncode == 0, done.stderr
    loaded, text = done.stdout.split("\n\n", 1)
    assert "MimoSSMForCausalLM" in loaded
    assert "[4, 4]" in loaded
    assert text.startswith("KING:")
    assert len(text) > len("KING:\n")


def test_pipeline_needs_only_the_directory(language_model):
    directory = str(language_model[0])
    written = pipeline("text-generation", model=directory)("KING:", do_sample=False, max_new_tokens=9)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokens = model.generate(**tokenizer("KING:", return_tensors="pt"), do_sample=False, max_new_tokens=9)
    assert written[0]["generated_text"] == tokenizer.decode(tokens[0])


@pytest.mark.parametrize("model_type", ["mimo_ssm", "mamba", "mamba2", "reducible_mamba", "reducible_mamba2"])
def test_pretraining_takes_every_architecture_and_learns_a_tokenizer(tmp_path, repo_env, model_type):
    text = tmp_path / "text.txt"
    text.write_bytes((EXAMPLES / "data" / "tinyshakespeare.txt").read_bytes()[:10_000])
    where = ["--train_file", str(text), "--output_dir", str(tmp_path / "model"), "--model_type", model_type]
    options = ["--sequence_length", "32", "--max_steps", "8", "--end", "0.5", "--num_reductions", "1"]
    options += ["--tokenizer", "bpe", "--vocab_size", "400", "--eval_strategy", "no"]
    done = run(repo_env, "pretrain_clm.py", *where, *options, *TINY, *QUICK)
    assert done.returncode == 0, done.stderr
    assert state_sizes(tmp_path / "model") == [4, 4]
    per_token, per_byte = (
        [float(number) for number in line.split()[-3:]]
        for line in done.stdout.splitlines()
        if line.startswith("validation loss")
    )
    bytes_per_token = float(done.stdout.split("400 different tokens, ")[1].split()[0])
    assert bytes_per_token > 1.3
    assert per_byte == pytest.approx([loss / bytes_per_token for loss in per_token], abs=0.02)
    write = pipeline("text-generation", model=str(tmp_path / "model"))
    assert (write.model.config.model_type, write.model.config.vocab_size) == (model_type, 400)
    text = write("KING:", max_new_tokens=9)[0]["generated_text"]
    assert len(write.tokenizer(text)["input_ids"]) > 5


def test_classification_learns_digits_with_a_reduced_state(tmp_path, repo_env):
    done = run(
        repo_env, "classify_sequences.py", "--output_dir", str(tmp_path), "--num_train_epochs", "8", *TINY, *QUICK
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == results
    assert results["state_sizes_before"] == [16, 16]
    assert results["state_sizes"] == state_sizes(tmp_path) == [4, 4]
    assert results["accuracy"] > 0.3  # ten classes
    assert results["steps"] == 8 * 29
    assert results["train_seconds"] > 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.num_parameters() == results["parameters"] < results["parameters_before"]


def test_a_missing_model_is_one_line_and_a_failure(tmp_path, repo_env):
    done = run(repo_env, "generate.py", "--model", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no model in {tmp_path / 'nothing'}, nor one of this name on the Hub")
    assert len(done.stderr.splitlines()) == 1
