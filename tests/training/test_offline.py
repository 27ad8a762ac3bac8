"""Checkpoints reduced on disk, and the runs that go on from them."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from runs import assert_equal_bit_for_bit, make_trainer, trainer_state
from safetensors.torch import load_file
from tiny import Windows, tiny_lm
from transformers import MambaConfig, MambaForCausalLM, Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_compressm import (
    CompressionConfig,
    CompressionReport,
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ssm_param_groups,
)
from hf_compressm.hub import Run, build_card
from hf_compressm.training import reduce_checkpoint

CONFIG = CompressionConfig(tolerance=0.1, start=0, end=10, num_reductions=1)
SAVING = {"save_strategy": "steps", "save_steps": 10}
SIZES = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 16}


def loader():
    return [{"input_ids": torch.stack([Windows()[4 * i + j]["input_ids"] for j in range(4)])} for i in range(2)]


def mamba2():
    torch.manual_seed(0)
    return ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, num_heads=2, head_dim=8, n_groups=2))


@pytest.fixture(scope="module")
def reduced_in_training(tmp_path_factory):
    """A run that is reduced at step 10 of 20."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), callbacks=[CompreSSMCallback(CONFIG)], **SAVING)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The checkpoint of the same run at step 10 without a reduction."""
    path = tmp_path_factory.mktemp("plain")
    make_trainer(path, callbacks=[], max_steps=20, **SAVING).train()
    return path / "checkpoint-10"


def test_the_checkpoint_is_the_one_of_a_run_reduced_in_training(reduced_in_training, plain, tmp_path):
    target = tmp_path / "checkpoint-10"
    reduced = reduce_checkpoint(plain, target, CONFIG)
    expected = reduced_in_training.args.output_dir + "/checkpoint-10"
    found, wanted = (load_file(f"{path}/model.safetensors") for path in (target, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    found, wanted = (torch.load(f"{path}/optimizer.pt") for path in (target, expected))
    assert found["param_groups"] == wanted["param_groups"]
    for index, state in wanted["state"].items():
        assert all(torch.equal(state[key], found["state"][index][key]) for key in state)
    ours, theirs = trainer_state(target), trainer_state(Path(expected))
    for state in (ours, theirs):  # the Trainer has not yet logged its own step when the callback does
        state["log_history"].sort(key=str)
        report = state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["report"]
        report.pop("run")  # of a run with one
        del report["events"][0]["log_entries"]  # None in training
    assert ours == theirs
    assert [event.step for event in CompressionReport.load(target).events] == [10]
    assert reduced.events[0].changed
    counts = [
        tiny_lm(state_size=32).num_parameters(),
        sum(value.numel() for value in load_file(f"{expected}/model.safetensors").values()),
    ]
    assert list(reduced.run["parameters"].values()) == counts


@pytest.mark.parametrize("callback", [True, False], ids=["with callback", "without"])
def test_a_run_resumed_from_it_equals_the_run_reduced_in_training(reduced_in_training, plain, tmp_path, callback):
    target = tmp_path / "checkpoint-10"
    reduce_checkpoint(plain, target, CONFIG)
    callbacks = [CompreSSMCallback(CONFIG)] if callback else []
    resumed = make_trainer(tmp_path / "run", callbacks=callbacks, **SAVING)
    resumed.train(resume_from_checkpoint=str(target))
    assert_equal_bit_for_bit(resumed, reduced_in_training)
    if callback:
        assert [event.step for event in callbacks[0].report.events] == [10]


def test_moments_of_new_maps_and_groups_of_state_spaces_find_their_place(tmp_path):
    """A Mamba-2 gains parameters, and its optimizer has three groups."""

    def trainer(path, callbacks):
        model = mamba2()
        optimizer = torch.optim.AdamW(ssm_param_groups(model, lr=3e-3, ssm_lr=1e-3))
        return make_trainer(path, model=model, callbacks=callbacks, optimizers=(optimizer, None), **SAVING)

    trainer(tmp_path / "plain", []).train()
    target = tmp_path / "checkpoint-10"
    reduce_checkpoint(tmp_path / "plain" / "checkpoint-10", target, CONFIG, loader())
    weights = load_file(target / "model.safetensors")
    states, n = weights["backbone.layers.0.mixer.B_map"].shape[1:]
    assert states < n == 16
    resumed = trainer(tmp_path / "run", [CompreSSMCallback(CONFIG)])
    resumed.train(resume_from_checkpoint=str(target))
    B_map = resumed.model.backbone.layers[0].mixer.B_map
    assert not torch.equal(B_map, weights["backbone.layers.0.mixer.B_map"])
    state = resumed.optimizer.optimizer.state
    steps = {name: float(state[param]["step"]) for name, param in resumed.model.named_parameters()}
    assert {count for name, count in steps.items() if "_map" not in name} == {20}
    assert {count for name, count in steps.items() if "_map" in name} == {10}


def test_a_stock_model_stays_one_and_keeps_its_shards(tmp_path):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**SIZES))
    source, target = tmp_path / "stock", tmp_path / "reduced"
    model.save_pretrained(source, max_shard_size="8KB")
    (source / "tokenizer.json").write_text("{}")
    report = reduce_checkpoint(source, target, CompressionConfig(tolerance=0.2), loader())
    size = report.events[-1].layers[0].after
    config = json.loads((target / "config.json").read_text())
    assert config["state_size"] == size < 16
    assert config["model_type"] == "mamba"
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "tokenizer.json").exists()
    reloaded, info = MambaForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert reloaded.backbone.layers[0].mixer.A_log.shape[1] == size
    again = reduce_checkpoint(target, tmp_path / "again", CompressionConfig(target_state_size=size // 2), loader())
    assert [event.layers[0].after for event in again.events] == [size, size // 2]


def test_an_unknown_order_of_parameters_resets_the_moments_and_says_so(plain, tmp_path, caplog):
    source = tmp_path / "checkpoint-10"
    shutil.copytree(plain, source)
    saved = torch.load(source / "optimizer.pt")
    saved["param_groups"] = saved["param_groups"][::-1]
    torch.save(saved, source / "optimizer.pt")
    with caplog.at_level(logging.WARNING, "hf_compressm"):
        reduce_checkpoint(source, tmp_path / "reduced", CONFIG)
    assert "moments" in caplog.text
    assert torch.load(tmp_path / "reduced" / "optimizer.pt")["state"] == {}
    model = tiny_lm(state_size=32)  # whose owner knows the order
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = [[p for n, p in model.named_parameters() if (n in decayed) == decay] for decay in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    resumed = make_trainer(tmp_path / "run", model=model, callbacks=[], optimizers=(optimizer, None), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "reduced"))
    assert getattr(resumed.lr_scheduler, "scheduler", resumed.lr_scheduler).last_epoch == 20
    assert {float(state["step"]) for state in resumed.optimizer.optimizer.state.values()} == {10}


def test_a_state_by_names_is_carried_like_one_by_positions(plain, tmp_path):
    """As engines consolidate it."""
    source = tmp_path / "checkpoint-10"
    shutil.copytree(plain, source)
    saved = torch.load(source / "optimizer.pt")
    model = tiny_lm(state_size=32)
    decayed = Trainer.get_decay_parameter_names(None, model)
    names = [n for n, _ in model.named_parameters()]
    order = [n for n in names if n in decayed] + [n for n in names if n not in decayed]
    for group in saved["param_groups"]:
        group["params"] = [order[i] for i in group["params"]]
    saved["state"] = {order[i]: state for i, state in saved["state"].items()}
    (source / "optimizer.pt").unlink()
    torch.save(saved, source / "optimizer.bin")
    reduce_checkpoint(plain, tmp_path / "by_position", CONFIG)
    reduce_checkpoint(source, tmp_path / "by_name", CONFIG)
    found, expected = torch.load(tmp_path / "by_name/optimizer.bin"), torch.load(tmp_path / "by_position/optimizer.pt")
    for index, state in expected["state"].items():
        assert all(torch.equal(state[key], found["state"][order[index]][key]) for key in state)


def test_what_belongs_to_the_model_before_stays_behind(plain, tmp_path):
    """A run whose output directory has checkpoints: the reduced one must not resume from them, nor have its card."""
    source, target = tmp_path / "run", tmp_path / "reduced"
    shutil.copytree(plain, source)
    shutil.copytree(plain, source / "checkpoint-10")
    (source / "additional_chat_templates").mkdir()
    for name in ("README.md", "compression_plot.png", "additional_chat_templates/tool_use.jinja", "vocab.json"):
        (source / name).write_text("of the source")
    reduce_checkpoint(source, target, CONFIG)
    assert get_last_checkpoint(target) is None
    assert (target / "additional_chat_templates" / "tool_use.jinja").read_text() == "of the source"
    assert (target / "vocab.json").exists()
    assert not (target / "README.md").exists()
    assert not (target / "compression_plot.png").exists()
    unchanged = CompressionConfig(tolerance=1e-9)
    assert not reduce_checkpoint(source, tmp_path / "same", unchanged).events[0].changed
    assert (tmp_path / "same" / "README.md").read_text() == "of the source"


def test_the_card_of_a_resumed_run_tells_of_the_evaluations_since(tmp_path):
    evaluated = SAVING | {"eval_strategy": "steps", "eval_steps": 5}
    make_trainer(tmp_path / "plain", callbacks=[], **evaluated).train()
    target = tmp_path / "checkpoint-10"
    reduce_checkpoint(tmp_path / "plain" / "checkpoint-10", target, CONFIG)
    assert "No evaluation was recorded" in build_card(Run.load(target)).text
    resumed = make_trainer(tmp_path / "run", callbacks=[CompreSSMCallback(CONFIG)], **evaluated)
    resumed.train(resume_from_checkpoint=str(target))
    run = Run.load(tmp_path / "run" / "checkpoint-20")
    assert [step for step, _ in run.evaluations()] == [15, 20]
    card = build_card(run)
    assert "| optimizer step | 15 | 20 |" in card.text
    assert "training step, median" not in card.text
    assert card.data.eval_results[0].metric_value == run.evaluations()[-1][1]["loss"]


def test_a_dry_run_writes_nothing(plain, tmp_path):
    report = reduce_checkpoint(plain, tmp_path / "reduced", CompressionConfig(tolerance=0.1, dry_run=True))
    assert report.events[0].changed
    assert not (tmp_path / "reduced").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Expected config.json and whole weights"),
        ({"config.json": "{}", "pytorch_model_fsdp_0": ""}, "accelerate merge-weights"),
        ({"adapter_config.json": "{}"}, "adapters without their base"),
        ({"config.json": '{"model_type": "bert", "architectures": ["Bert"]}', "model.safetensors": ""}, "model class"),
    ],
)
def test_what_cannot_be_reduced_is_refused(tmp_path, files, message):
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        reduce_checkpoint(source, tmp_path / "target", CONFIG)


def test_nothing_is_overwritten(plain):
    with pytest.raises(ValueError, match="not empty"):
        reduce_checkpoint(plain, plain, CONFIG)
