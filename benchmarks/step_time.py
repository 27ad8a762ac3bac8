"""How the training step falls with the state size, at fixed width: forward, backward and AdamW.

All sizes take turns in one process; the medians and their ratios to the largest size are printed, with the peak memory
of a process that trains that size alone.

    python -m benchmarks step_time --threads 1
"""

import argparse
import subprocess
import sys
from contextlib import nullcontext
from statistics import median

import torch

from hf_compressm import (
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
)
from hf_compressm.ops import fused

from .common import now, peak_memory, save_results

SELECTIVE = {"sizes": [128, 64, 32, 16, 12], "hidden_size": 256, "layers": 2, "batch": 8, "length": 512}
SETTINGS = {
    "pixels": {"sizes": [256, 128, 64, 32, 16], "hidden_size": 8, "layers": 1, "batch": 50, "length": 784},
    "text": {"sizes": [256, 128, 64, 32, 16], "hidden_size": 128, "layers": 2, "batch": 16, "length": 256},
    "mamba": SELECTIVE,
    "mamba-numba": SELECTIVE.copy(),
    "mamba2": SELECTIVE.copy(),
}
TEXT_MODELS = {
    "text": (MimoSSMConfig, MimoSSMForCausalLM, {}),
    "mamba": (ReducibleMambaConfig, ReducibleMambaForCausalLM, {}),
    "mamba-numba": (ReducibleMambaConfig, ReducibleMambaForCausalLM, {}),
    "mamba2": (ReducibleMamba2Config, ReducibleMamba2ForCausalLM, {"num_heads": 8, "head_dim": 64, "n_groups": 1}),
}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--setting", choices=SETTINGS, help="only this one")
    parser.add_argument("--memory_of", type=int, help="train this size alone and print the peak memory in MB")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        step = make_step(options.setting, options.memory_of)
        for _ in range(2):
            step()
        print(peak_memory())
        return
    settings = [options.setting] if options.setting else list(SETTINGS)
    save_results("step_time", {name: measure(name, options.rounds, options.threads) for name in settings})


def make_step(name: str, state_size: int):
    """A function that takes one training step of a new model on random data."""
    torch.manual_seed(0)
    setting = SETTINGS[name]
    shape = (setting["batch"], setting["length"])
    sizes = {
        "hidden_size": setting["hidden_size"],
        "state_size": state_size,
        "num_hidden_layers": setting["layers"],
    }
    if name == "pixels":
        model = MimoSSMForSequenceClassification(MimoSSMConfig(input_size=1, num_labels=10, **sizes))
        data = {"input_values": torch.randn(*shape, 1), "labels": torch.randint(10, shape[:1])}
    else:
        make_config, make_model, fields = TEXT_MODELS[name]
        model = make_model(make_config(vocab_size=257, **sizes, **fields))
        tokens = torch.randint(257, shape)
        data = {"input_ids": tokens, "labels": tokens}
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with nullcontext() if name == "mamba-numba" else fused.disabled():
            model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, rounds: int, threads: int) -> dict:
    """Median seconds by state size, taken in turns, and peak memory in MB."""
    setting = SETTINGS[name]
    steps = {size: make_step(name, size) for size in setting["sizes"]}
    times = {size: [] for size in steps}
    for round_ in range(rounds + 1):
        for size, step in steps.items():
            start = now()
            step()
            if round_:  # the first round warms up
                times[size].append(now() - start)
    rows = {}
    largest = median(times[setting["sizes"][0]])
    shape = ", ".join(f"{key} {value}" for key, value in setting.items() if key != "sizes")
    print(f"\n{name}: {shape}\n{'states':>6}  {'ms':>7}  {'ratio':>5}  {'peak MB':>7}")
    for size, seconds in times.items():
        memory = memory_of(name, size, threads)
        rows[size] = {"ms": 1e3 * median(seconds), "speedup": largest / median(seconds), "peak_mb": memory}
        print(f"{size:>6}  {rows[size]['ms']:>7.1f}  {rows[size]['speedup']:>5.2f}  {memory:>7.0f}")
    return {**setting, "rows": rows}


def memory_of(name: str, size: int, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks", "step_time", "--threads", str(threads)]
    command += ["--setting", name, "--memory_of", str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
