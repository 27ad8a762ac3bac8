"""Tokens per second after short and long prompts, one by one with a cache: stock models of transformers, and ours.

OMP_NUM_THREADS=1 python -m benchmarks generation
"""

import argparse
from contextlib import nullcontext
from statistics import median

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm import (
    MimoSSMConfig,
    MimoSSMForCausalLM,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    use_fast_scans,
)

from .common import now, save_results

SIZES = {"vocab_size": 257, "hidden_size": 256, "num_hidden_layers": 4, "state_size": 64}
HEADS = {"num_heads": 8, "head_dim": 64, "n_groups": 1}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks generation", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512, 2048])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    models = make_models()
    times = {name: {length: [] for length in options.prompts} for name in models}
    for round_ in range(options.rounds + 1):
        for name, model in models.items():
            for length in options.prompts:
                seconds = decode(model, length, options.new_tokens)
                if round_:
                    times[name][length].append(seconds)
    rows = {}
    print(f"{'tokens/s after':>28}  " + "  ".join(f"{length:>6}" for length in options.prompts))
    for name, found in times.items():
        rows[name] = {length: options.new_tokens / median(seconds) for length, seconds in found.items()}
        print(f"{name:>28}  " + "  ".join(f"{speed:>6.1f}" for speed in rows[name].values()))
    save_results("generation", {"sizes": SIZES | HEADS, "tokens_per_second": rows})


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    models = {
        "mamba, stock": MambaForCausalLM(MambaConfig(**SIZES)),
        "mamba, reducible": ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES)),
        "mamba2, stock": Mamba2ForCausalLM(Mamba2Config(**SIZES, **HEADS)),
        "mamba2, reducible": ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, **HEADS)),
        "mimo_ssm": MimoSSMForCausalLM(MimoSSMConfig(**SIZES)),
    }
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def decode(model: torch.nn.Module, length: int, new_tokens: int) -> float:
    """Seconds for `new_tokens` greedy tokens, one by one, after a prompt that does not count."""
    tokens = torch.randint(257, (1, length), generator=torch.Generator().manual_seed(0))
    stock = isinstance(model, (MambaForCausalLM, Mamba2ForCausalLM))
    with use_fast_scans(model) if stock else nullcontext():  # the loop of stock Mamba would take minutes
        out = model(tokens, use_cache=True)
    start = now()
    for _ in range(new_tokens):
        out = model(out.logits[:, -1:].argmax(-1), cache=out.cache, use_cache=True)
    return now() - start
