"""The command line as people and scripts use it."""

import json
import shutil
import tomllib
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from runs import make_trainer
from tiny import TEXT, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from byte_tokenizer import byte_tokenizer
from hf_compressm import (
    CompressionConfig,
    CompressionReport,
    CompreSSMCallback,
    MimoSSMConfig,
    MimoSSMForSequenceClassification,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
)
from hf_compressm.cli import main

SMALL = ["--sequence_length", "32", "--batch_size", "4", "--calibration_batches", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of saved models by name, and a text."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
    made = {
        "lru": tiny_lm(state_size=16),
        "mamba": ReducibleMambaForCausalLM(ReducibleMambaConfig(**sizes)),
        "mamba2": Mamba2ForCausalLM(Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_bytes(TEXT.read_bytes()[:20_000])
    return root


@pytest.fixture
def run(models, monkeypatch, capsys):
    """Run a command beside the models: its exit code, and what it printed to stdout and stderr."""
    monkeypatch.chdir(models)

    def run_(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run_


def sizes(directory):
    config = AutoModelForCausalLM.from_pretrained(directory).config
    return [layer.state_size for layer in config.per_layer_config]


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("analyze", "reduce", "plot", "card", "export", "examples:"))
    for command in ("analyze", "reduce", "plot", "card", "export"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"  hf-compressm {command} " in out.partition("examples:")[2]


def test_options_are_those_of_the_config_without_a_schedule(run):
    _, out, _ = run("reduce", "--help")
    in_a_run = {"start", "end", "num_reductions", "dry_run"}
    for field in fields(CompressionConfig):
        rollback = "rollback" in field.name or field.name == "greater_is_better"
        assert (f"--{field.name} " in out) == (field.name not in in_a_run and not rollback), field.name


def test_analyze_prints_a_table_and_json(run, models):
    before = (models / "lru" / "model.safetensors").read_bytes()
    code, out, _ = run("analyze", "lru", "--tolerances", 0.1, 0.4)
    assert code == 0
    assert out.splitlines()[0].split() == ["states", "kept", "now", "τ=0.1", "τ=0.4"]
    assert "bound of the H∞ error" in out
    code, out, _ = run("analyze", "mamba", "--data", "text.txt", "--tolerances", 0.4, "--json", *SMALL)
    assert code == 0
    (candidate,) = json.loads(out)["candidates"]
    assert candidate["rule"] == "τ=0.4"
    assert candidate["step"]["seconds"] > 0
    assert (models / "lru" / "model.safetensors").read_bytes() == before


def test_reduce_writes_a_model_that_loads_and_tells_what_it_cost(run, tmp_path):
    out_dir = tmp_path / "small"
    code, out, _ = run("reduce", "mamba", out_dir, "--data", "text.txt", "--target_state_size", 4, *SMALL)
    assert code == 0
    assert sizes(out_dir) == [4, 4]
    report = CompressionReport.load(out_dir)
    loss = report.run["loss"]
    assert f"{loss['before']:.4f} before, {loss['after']:.4f} after" in out
    assert loss["data"] == "8 sequences of text.txt"
    assert AutoTokenizer.from_pretrained(out_dir)("a")["input_ids"] == [97]
    code, out, _ = run("card", out_dir, "--license", "mit")
    assert code == 0
    assert "license: mit" in (out_dir / "README.md").read_text()
    assert (out_dir / "modeling_reducible_mamba.py").exists()


@pytest.fixture
def trained(models, tmp_path):
    """The output directory of a run with evaluations, reduced once while it trained."""
    callback = CompreSSMCallback(target_state_size=8, start=0, end=2, num_reductions=1)
    evaluated = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path / "trained", tiny_lm(state_size=16), [callback], **evaluated)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    byte_tokenizer().save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_the_card_of_a_reduction_tells_of_the_reduced_model(run, trained, tmp_path):
    (trained / "compression_report.json").unlink()  # as if it had not been reduced: evaluations of the large model
    out_dir = tmp_path / "small"
    command = ["reduce", trained, out_dir, "--data", "text.txt", "--target_state_size", 4, *SMALL]
    assert run(*command)[0] == 0
    text, report = (out_dir / "README.md").read_text(), CompressionReport.load(out_dir)
    loss = report.run["loss"]
    assert f"| loss | {loss['before']:.4g} | {loss['after']:.4g} |" in text
    assert "optimizer step |" not in text
    assert "model-index" not in text
    assert "after its training" in text
    assert "in one pass over the checkpoint of step 4" in text
    assert "Data: text.txt (for the reduction)." in text
    assert report.run["command"] == " ".join(["hf-compressm", *map(str, command)])
    assert (out_dir / "compression_plot.png").exists()


def test_a_second_reduction_adds_to_what_the_run_did(run, trained, tmp_path):
    (trained / "trainer_state.json").unlink()
    for source, target, rule in (
        (trained, "once", ["--reduction_fraction", 0.5]),
        (tmp_path / "once", "twice", ["--target_state_size", 2, "--data", "text.txt", *SMALL]),
    ):
        code, _, err = run("reduce", source, tmp_path / target, *rule)
        assert code == 0, err
    text, report = (tmp_path / "twice" / "README.md").read_text(), CompressionReport.load(tmp_path / "twice")
    assert [event.step for event in report.events] == [2, 2, 2]
    assert "Rank rule: `target_state_size=8`, `reduction_fraction=0.5`, `target_state_size=2` per reduction." in text
    assert "steps 2, 2 (outside training), 2 (outside training);" in text
    assert "while it trained" in text
    assert "| before the last reduction | after it |" in text
    assert "training step, median" not in text


def test_reduce_by_loss_and_without_data(run, tmp_path):
    code, _, _ = run("reduce", "lru", tmp_path / "a", "--data", "text.txt", "--max_loss_increase", 0.1, *SMALL)
    assert code == 0
    code, out, _ = run("reduce", "lru", tmp_path / "b", "--target_state_size", 4)
    assert code == 0
    assert "loss on" not in out
    assert sizes(tmp_path / "b") == [4, 4]


def test_models_of_numbers_are_reduced_too(run, models, tmp_path):
    config = MimoSSMConfig(input_size=1, hidden_size=8, state_size=8, num_hidden_layers=1, num_labels=2)
    MimoSSMForSequenceClassification(config).save_pretrained(models / "numbers")
    rows = {"input_values": [[0.1 * i] * 12 for i in range(16)], "label": [0, 1] * 8}
    Dataset.from_dict(rows).to_parquet(models / "numbers.parquet")
    arguments = ["--data", "numbers.parquet", "--max_loss_increase", 0.5, *SMALL]
    code, out, err = run("reduce", "numbers", tmp_path / "small", *arguments)
    assert code == 0, err
    assert "loss on 8 sequences" in out
    assert json.loads((tmp_path / "small" / "config.json").read_text())["architectures"] == [
        "MimoSSMForSequenceClassification"
    ]


def test_plot_and_card_of_a_run(run, finished_run_copy):
    assert run("plot", finished_run_copy, "--output", finished_run_copy / "figure.pdf")[0] == 0
    assert (finished_run_copy / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert run("plot", finished_run_copy)[0] == 0
    assert (finished_run_copy / "compression_plot.png").stat().st_size > 5000


@pytest.fixture
def finished_run_copy(models, tmp_path):
    """What `reduce` leaves, as a run directory."""
    assert main(["reduce", str(models / "lru"), str(tmp_path / "reduced")]) == 0
    return tmp_path / "reduced"


def test_export(run, tmp_path):
    assert run("reduce", "mamba", tmp_path / "m", "--data", "text.txt", "--uniform", "true", *SMALL)[0] == 0
    assert run("export", tmp_path / "m", tmp_path / "stock")[0] == 0
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "mamba"
    assert (tmp_path / "stock" / "tokenizer.json").exists()
    assert run("export", "lru", tmp_path / "code", "--to", "remote_code")[0] == 0
    assert (tmp_path / "code" / "modeling_mimo_ssm.py").exists()


def damage(models):
    """Models and data that are not what they should be."""
    if (models / "few").exists():
        return
    model = tiny_lm()
    model.resize_token_embeddings(99)
    model.save_pretrained(models / "few")
    byte_tokenizer().save_pretrained(models / "few")  # of 258 tokens
    shutil.copytree(models / "lru", models / "half")
    weights = (models / "half" / "model.safetensors").read_bytes()
    (models / "half" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (models / "nonsense").mkdir()
    (models / "nonsense" / "config.json").write_text("{nonsense")
    (models / "noise.csv").write_bytes(bytes(range(256)) * 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["analyze", "nothing/here"],
            "nothing/here is neither a directory nor a model on the Hub that can be read now",
        ),
        (["analyze", "."], "there is no config.json in ."),
        (["analyze", "adapter"], "it is an adapter; merge it into its model first"),
        (["analyze", "lru", "--tolerances", "1.5"], "--tolerances are fractions in the open interval (0, 1)"),
        (["analyze", "lru", "--tolerance", "2"], "`tolerance` is a fraction in the open interval (0, 1); found 2.0"),
        (["analyze", "mamba"], "the reduction of a reducible_mamba model depends on its input: give data"),
        (["analyze", "lru", "--max_loss_increase", "0.1"], "--max_loss_increase measures the loss: give data"),
        (["analyze", "lru", "--data", "no.txt"], "there is no file no.txt"),
        (["analyze", "lru", "--data", "noise.csv"], "cannot read noise.csv as .csv: "),
        (["analyze", "few", "--data", "text.txt", *SMALL], "expected input_ids below 99, as the model has them"),
        (["reduce", "few", "x", "--data", "text.txt", *SMALL], "expected input_ids below 99, as the model has them"),
        (["analyze", "half"], "the weights in half are damaged: "),
        (["reduce", "nonsense", "x"], "nonsense/config.json cannot be read: "),
        (["reduce", "lru", "lru"], "lru exists already: name a new or an empty directory"),
        (
            ["reduce", "lru", "x", "--target_state_size", "99"],
            "target_state_size=99 is above the present state size 16",
        ),
        (["reduce", "lru", "x", "--tolerance", ".1", "--reduction_fraction", ".5"], "at most one rank rule"),
        (["reduce", "lru", "x", "--method", "selection"], "LRU layers have no method 'selection'"),
        (["reduce", "bert", "x"], "has no layer whose state can be reduced"),
        (["plot", "lru"], "there is no compression_report.json in lru"),
        (["card", "lru"], "there is no compression_report.json in lru"),
        (["export", "lru", "x"], "transformers has no stock model for 'mimo_ssm'"),
        (["export", "mamba2", "x"], "a mamba2 model is a stock checkpoint already"),
        (["export", "mamba2", "x", "--to", "remote_code"], "a mamba2 model needs no code"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(run, models, arguments, message):
    (models / "adapter").mkdir(exist_ok=True)
    (models / "adapter" / "adapter_config.json").write_text("{}")
    damage(models)
    if "bert" in arguments and not (models / "bert").exists():
        from transformers import BertConfig, BertLMHeadModel

        tiny = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        BertLMHeadModel(BertConfig(vocab_size=16, is_decoder=True, **tiny)).save_pretrained(models / "bert")
    code, out, err = run(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""
    shutil.rmtree(models / "x", ignore_errors=True)


def test_a_command_line_that_makes_no_sense_is_exit_code_2(run):
    for arguments in (["reduce"], ["shrink", "lru"], ["analyze", "lru", "--method", "magic"], []):
        code, _, err = run(*arguments)
        assert code == 2
        assert "usage: hf-compressm" in err


def test_debug_shows_the_traceback(models):
    with pytest.raises(ValueError, match="neither a directory"):
        main(["analyze", "nothing/here", "--debug"])


def test_the_program_has_its_name():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("hf-compressm", scripts["hf-compressm"], "console_scripts").load() is main
