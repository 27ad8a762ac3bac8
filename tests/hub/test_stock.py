"""Stock checkpoints of reduced models."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_lm
from transformers import Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import (
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    compress,
)
from hf_compressm.hub import to_stock

SIZES = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 1}
IDS = torch.arange(40).reshape(2, 20) % 64


def reduced(family="mamba", **options):
    torch.manual_seed(0)
    if family == "mamba":
        model = ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES))
    else:
        model = ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, **HEADS))
    compress(model, dataloader=[{"input_ids": IDS}], **options)
    return model.eval()


@pytest.mark.parametrize(("family", "method", "stock"), [
    ("mamba", "balanced", MambaForCausalLM),
    ("mamba2", "selection", Mamba2ForCausalLM),
])  # fmt: skip
def test_a_uniformly_reduced_model_is_the_stock_model(family, method, stock):
    model = reduced(family, target_state_size=4, method=method, uniform=True)
    exported = to_stock(model).eval()
    assert type(exported) is stock
    assert exported.config.state_size == 4
    with torch.no_grad():
        torch.testing.assert_close(exported(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in exported.state_dict().items())


def test_plain_transformers_loads_it_in_a_new_process(tmp_path, repo_env):
    exported = to_stock(reduced(target_state_size=4)).eval()
    exported.save_pretrained(tmp_path)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval(); "
        "assert 'hf_compressm' not in sys.modules; "
        "print(type(model).__name__, model.config.state_size, "
        "model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], env=repo_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens = exported.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False).tolist()
    assert done.stdout.strip() == f"MambaForCausalLM 4 {tokens}"


def test_what_has_no_stock_form_says_what_to_do():
    with pytest.raises(ValueError, match=r"found \[8, 3\].*uniform=True"):
        to_stock(ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES, per_layer_config={1: {"state_size": 3}})))
    with pytest.raises(ValueError, match='method="selection"'):
        to_stock(reduced("mamba2", target_state_size=4, uniform=True))
    with pytest.raises(ValueError, match="--to remote_code"):
        to_stock(tiny_lm(state_size=4))
    with pytest.raises(ValueError, match="a stock checkpoint already"):
        to_stock(MambaForCausalLM(MambaConfig(**SIZES)))
