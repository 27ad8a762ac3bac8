"""Adapters on a reduced model, and no reduction under adapters."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from runs import arguments
from tiny import Windows, batch, tiny_lm
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, Trainer

from hf_compressm import (
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    UnsupportedSetupError,
    compress,
)

SIZES = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 16}
MODELS = {
    "mimo_ssm": (tiny_lm, ["gate"]),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SIZES)), ["in_proj", "x_proj"]),
    "reducible_mamba": (lambda: ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES)), ["in_proj", "x_proj"]),
    "reducible_mamba2": (
        lambda: ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, num_heads=2, head_dim=8, n_groups=1)),
        ["in_proj"],
    ),
}


@pytest.fixture(autouse=True)
def _peft_uses_a_renamed_property():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def logits(model):
    with torch.no_grad():
        return model.eval()(batch(2)["input_ids"]).logits


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_a_reduced_model_is_fine_tuned_saved_reloaded_and_merged(name, use_dora, tmp_path):
    make, targets = MODELS[name]
    model = make()
    report = compress(model, tolerance=0.2, dataloader=[batch(4), batch(4)])
    assert report.events[0].changed
    model.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=4, use_dora=use_dora, task_type="CAUSAL_LM"))
    args = arguments(tmp_path / "run", max_steps=8, learning_rate=5e-2, logging_steps=1)
    trainer = Trainer(model=adapted, args=args, train_dataset=Windows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    plain = logits(base)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    saved, found = get_peft_model_state_dict(adapted), get_peft_model_state_dict(reloaded)
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in saved.items())
    torch.testing.assert_close(logits(reloaded), logits(adapted), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(reloaded), plain, atol=1e-3)

    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(merged), rtol=1e-5, atol=1e-6)
    size = report.events[0].layers[0].after
    report = compress(merged, target_state_size=size // 2, dataloader=[batch(4), batch(4)])
    assert report.events[0].layers[0].after == size // 2


def added(model):
    """As transformers adds adapters by itself."""
    return inject_adapter_in_model(LoraConfig(target_modules=["gate"], r=2), model)


@pytest.mark.parametrize("adapt", [lambda m: get_peft_model(m, LoraConfig(target_modules=["gate"], r=2)), added])
def test_a_reduction_under_adapters_is_refused_before_the_first_step(adapt, tmp_path):
    model = adapt(tiny_lm())
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Windows(), callbacks=[CompreSSMCallback(tolerance=0.1)]
    )
    with pytest.raises(UnsupportedSetupError, match="merge_and_unload"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(UnsupportedSetupError, match="merge_and_unload"):
        compress(model, tolerance=0.1)


def test_adapters_of_another_state_size_do_not_load(tmp_path):
    make, _ = MODELS["reducible_mamba"]
    adapted = get_peft_model(make(), LoraConfig(target_modules=["x_proj"], r=4))
    adapted.save_pretrained(tmp_path)
    smaller = make()
    compress(smaller, tolerance=0.2, dataloader=[batch(4), batch(4)])
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(smaller, tmp_path)
