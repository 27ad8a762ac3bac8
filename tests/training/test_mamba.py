"""Mamba and Mamba-2, stock and reducible, shrink while the stock Trainer trains them."""

import subprocess
import sys

import pytest
import torch
from tiny import Windows, batch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_compressm import (
    CompressionReport,
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    compress,
    ssm_param_groups,
)

SIZES = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 16}
HEADS = {"num_heads": 4, "head_dim": 8, "n_groups": 1}
MAKE = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **HEADS)),
    "reducible_mamba": lambda: ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES)),
    "reducible_mamba2": lambda: ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, **HEADS)),
}


def make_model(name):
    torch.manual_seed(0)
    return MAKE[name]()


def make_trainer(path, model, callback, optimizers=(None, None), **options):
    defaults = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none"}
    defaults |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0}
    args = TrainingArguments(str(path), **{**defaults, **options})
    data = Windows(length=32)
    return Trainer(model=model, args=args, train_dataset=data, callbacks=[callback], optimizers=optimizers)


def sizes_of(model):
    return [layer.mixer.ssm_state_size for layer in model.backbone.layers]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(batch(length=32)["input_ids"]).logits


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_the_state_shrinks_during_training(tmp_path, name, options):
    model = make_model(name)
    callback = CompreSSMCallback(target_state_size=4, start=2, end=8, num_reductions=2)
    trainer = make_trainer(tmp_path, model, callback, **options)
    trainer.train()
    assert sizes_of(model) == [4, 4]
    assert model.config.state_size == 4
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}
    for param, state in trainer.optimizer.optimizer.state.items():
        assert all(t.shape == param.shape for t in state.values() if torch.is_tensor(t) and t.dim())

    trainer.save_model(tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(reloaded) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in reloaded.state_dict().items())
    with torch.autocast("cpu", enabled=bool(options.get("bf16"))):  # as the Trainer does
        assert torch.equal(logits_of(reloaded), logits_of(model))
    report = CompressionReport.load(tmp_path)
    assert [layer.after for layer in report.events[0].layers] == [8, 8]
    assert all(0 < layer.relative_error < 1 for event in report.events for layer in event.layers)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "hf_compressm" not in sys.modules
ids = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([model.eval()(ids).logits, model.generate(ids[:, :8], max_new_tokens=5, do_sample=False)], sys.argv[3])
"""


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_reduced_stock_model_reloads_with_transformers_alone(tmp_path, name):
    model = make_model(name)
    callback = CompreSSMCallback(target_state_size=6, end=4, num_reductions=1)
    make_trainer(tmp_path, model, callback, max_steps=6).train()
    model.save_pretrained(tmp_path / "model")
    ids = batch(length=32)["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / part) for part in ("model", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", PLAIN, *paths], check=True)
    logits, tokens = torch.load(tmp_path / "out.pt")
    assert torch.equal(logits, logits_of(model))
    assert torch.equal(tokens, model.generate(ids[:, :8], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("name", MAKE)
def test_a_factored_optimizer_follows(tmp_path, name):
    callback = CompreSSMCallback(target_state_size=4, start=2, end=6, num_reductions=2)
    trainer = make_trainer(tmp_path, make_model(name), callback, max_steps=10, optim="adafactor")
    trainer.train()
    assert sizes_of(trainer.model) == [4, 4]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("step", [3, 5, 8])
@pytest.mark.parametrize("name", ["mamba", "reducible_mamba", "reducible_mamba2"])
def test_a_resumed_run_equals_the_straight_one(tmp_path, name, step):
    """Before the event, inside its window, and after it."""

    def run(path, resume=None):
        callback = CompreSSMCallback(tolerance=0.3, start=2, end=6, num_reductions=1, calibration_batches=2)
        trainer = make_trainer(path, make_model(name), callback, max_steps=10, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / f"checkpoint-{step}"))
    assert sizes_of(straight) == sizes_of(resumed)
    assert max(sizes_of(straight)) < 16
    weights = straight.state_dict()
    assert weights.keys() == resumed.state_dict().keys()
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", ["reducible_mamba", "reducible_mamba2"])
def test_layers_of_different_sizes_reload_and_reduce_again(tmp_path, name):
    model = make_model(name)
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight.mul_(0.05)  # hardly selective: few directions matter
    compress(model, tolerance=0.2, dataloader=[batch(length=32)])
    sizes = sizes_of(model)
    assert sizes[0] != sizes[1]
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sizes_of(reloaded) == sizes
    assert torch.equal(logits_of(reloaded), logits_of(model))
    compress(reloaded, target_state_size=1, dataloader=[batch(length=32)])
    assert sizes_of(reloaded) == [1, 1]
    assert logits_of(reloaded).isfinite().all()


@pytest.mark.parametrize("name", MAKE)
def test_a_finished_model_is_reduced_within_a_loss_limit(name):
    model = make_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        model(**batch(length=32)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data = DataLoader(Windows(length=32), batch_size=8)

    def loss():
        model.eval()
        with torch.no_grad():
            return model(**batch(size=32, length=32)).loss.item()

    before = loss()
    report = compress(model, max_loss_increase=0.02, dataloader=data, optimizer=optimizer)
    assert max(sizes_of(model)) < 16
    assert loss() - before < 0.03
    assert [layer.after for layer in report.events[0].layers] == sizes_of(model)


def test_what_cannot_be_reduced_exactly_is_refused_by_name(tmp_path):
    model = FalconMambaForCausalLM(FalconMambaConfig(**SIZES))
    trainer = make_trainer(tmp_path, model, CompreSSMCallback())
    with pytest.raises(ValueError, match="FalconMambaMixer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_stock_layers_share_one_size():
    with pytest.raises(ValueError, match="uniform=False needs a state size per layer"):
        compress(make_model("mamba"), uniform=False, dataloader=[batch(length=32)])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_stock_model_made_anew_takes_a_reduced_checkpoint(tmp_path, name):
    def run(path, resume=None):
        callback = CompreSSMCallback(target_state_size=4, start=1, end=3, num_reductions=1)
        args = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "seed": 0}
        args |= {"save_strategy": "steps", "save_steps": 4, "disable_tqdm": True}
        trainer = Trainer(
            model_init=lambda: make_model(name),
            args=TrainingArguments(str(path), **args),
            train_dataset=Windows(length=32),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-4"))
    assert sizes_of(resumed) == [4, 4]
    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_an_optimizer_of_the_users_own_takes_the_new_maps_of_a_checkpoint(tmp_path):
    def run(path, resume=None):
        model = make_model("reducible_mamba2")
        optimizer = torch.optim.AdamW(ssm_param_groups(model, lr=3e-3, ssm_lr=1e-3, weight_decay=0.1))
        callback = CompreSSMCallback(target_state_size=4, start=1, end=3, num_reductions=1)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
        trainer = make_trainer(path, model, callback, optimizers=(optimizer, None), **options)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-4"))
    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_maps_of_a_frozen_layer_are_frozen():
    model = make_model("reducible_mamba2")
    mixer = model.backbone.layers[0].mixer.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    compress(model, target_state_size=4, dataloader=[batch(length=32)], optimizer=optimizer)
    assert not mixer.B_map.requires_grad
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2]), "Muon takes matrices only"),
        (lambda ps: torch.optim.AdamW(sorted(ps, key=torch.Tensor.numel)), "in the order of `model.parameters"),
    ],
)
def test_an_optimizer_that_could_not_take_new_maps_is_refused(make, message):
    model = make_model("reducible_mamba2")
    optimizer = make(list(model.parameters()))
    with pytest.raises(ValueError, match=message):
        compress(model, target_state_size=4, dataloader=[batch(length=32)], optimizer=optimizer)
    assert sizes_of(model) == [16, 16]
    compress(model, target_state_size=4, dataloader=[batch(length=32)], optimizer=optimizer, method="selection")
    assert sizes_of(model) == [4, 4]


def test_the_config_of_a_model_inside_another_follows(tmp_path):
    inner = make_model("mamba2")
    outer = torch.nn.ModuleDict({"language": inner})
    outer.forward = lambda **inputs: inner(**inputs)
    compress(outer, target_state_size=4, dataloader=[batch(length=32)])
    inner.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(inner))


def test_packed_sequences_are_not_mixed_up_silently():
    with pytest.raises(ValueError, match="expected no packed sequences, found seq_idx"):
        make_model("reducible_mamba")(**batch(length=32), seq_idx=torch.zeros(8, 32, dtype=torch.int32))
