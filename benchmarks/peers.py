"""Whole mixers, forward alone and with backward, against the scans of transformers and mambapy, and plain loops.

Contenders of one setting take turns in one process; medians of processor time (wall-clock time with several threads),
and the peak memory of a process of its own above what it held before the first step. Batch 8 and width 256, float32,
except for the LRU.

    OMP_NUM_THREADS=1 python -m benchmarks peers
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm import MimoSSMConfig, MimoSSMForSequenceClassification, fast_scans, ops, use_fast_scans
from hf_compressm.models.mimo_ssm.modeling_mimo_ssm import MimoSSMBlock
from hf_compressm.ops import fused, lru_scan, lru_scan_reference

from .common import now, peak_memory, save_results

BATCH, WIDTH = 8, 256
PURE, NUMBA = "ours", "ours, numba"
LOOP, COMPILED, MAMBAPY, PLAIN = "transformers loop", "associative_scan, compiled", "mambapy", "plain reference"
SETTINGS = {
    # name: (family, sizes, contenders, rounds)
    "mamba L=64 n=16": ("mamba", {"L": 64, "n": 16}, [PURE, NUMBA, LOOP, MAMBAPY, PLAIN], 3),
    "mamba L=256 n=16": ("mamba", {"L": 256, "n": 16}, [PURE, NUMBA, COMPILED, MAMBAPY], 7),
    "mamba L=256 n=64": ("mamba", {"L": 256, "n": 64}, [PURE, NUMBA, MAMBAPY], 3),
    "mamba L=256 n=8": ("mamba", {"L": 256, "n": 8}, [PURE, NUMBA], 5),
    "mamba L=256 n=128": ("mamba", {"L": 256, "n": 128}, [PURE, NUMBA], 3),
    "mamba L=1024 n=16": ("mamba", {"L": 1024, "n": 16}, [PURE, NUMBA, MAMBAPY], 3),
    "mamba L=1024 n=64": ("mamba", {"L": 1024, "n": 64}, [PURE, NUMBA], 3),
    "mamba L=4096 n=16": ("mamba", {"L": 4096, "n": 16}, [PURE, NUMBA], 2),
    "mamba2 L=1024 n=128 chunk=256": ("mamba2", {"L": 1024, "n": 128, "chunk": 256}, [PURE, NUMBA, "transformers"], 5),
    "mamba2 L=1024 n=128 chunk=64": ("mamba2", {"L": 1024, "n": 128, "chunk": 64}, [PURE, NUMBA, "transformers"], 5),
    "mamba2 L=256 n=16 chunk=256": ("mamba2", {"L": 256, "n": 16, "chunk": 256}, [PURE, "transformers"], 5),
    "lru L=784 N=256 H=8 batch=50": (
        "lru",
        {"L": 784, "n": 256, "H": 8, "batch": 50},
        [PURE, "recurrence in chunks", "matrix products alone", PLAIN],
        5,
    ),
    "lru training L=784 N=256 H=8 batch=50": (
        "lru_training",
        {"L": 784, "n": 256, "H": 8, "batch": 50},
        [PURE, "recurrence in chunks", "matrix products alone", PLAIN],
        5,
    ),
    "lru block L=1024 N=384 H=512 batch=4": (
        "lru_block",
        {"L": 1024, "n": 384, "H": 512, "batch": 4},
        [PURE, "matrix products alone"],
        5,
    ),
}
FULL = {
    "mamba L=1024 n=16, compiled": ("mamba", {"L": 1024, "n": 16}, [PURE, NUMBA, COMPILED, MAMBAPY], 3),
    "mamba L=1024 n=64, mambapy": ("mamba", {"L": 1024, "n": 64}, [PURE, NUMBA, MAMBAPY], 2),  # 9 GB
    "mamba L=1024 n=128": ("mamba", {"L": 1024, "n": 128}, [PURE, NUMBA], 2),
    "mamba L=4096 n=128": ("mamba", {"L": 4096, "n": 128}, [PURE, NUMBA], 1),
}
TWO_THREADS = ["mamba L=256 n=16", "mamba L=256 n=64", "mamba2 L=1024 n=128 chunk=256"]
SLOW_TO_START = {COMPILED}  # left out with two threads


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also what takes long, or 9 GB")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, *FULL], help="only these")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.time or options.memory:
        torch.set_num_threads(options.threads[0])
        warnings.simplefilter("ignore")
        found = time_of(options.time) if options.time else memory_of(*options.memory)
        print(json.dumps(found))
        return
    results = {}
    for threads in options.threads:
        names = options.settings or [*SETTINGS, *(FULL if options.full else [])]
        if threads > 1:
            names = [name for name in names if name in TWO_THREADS]
        for name in names:
            results[f"{name}, {threads} thread{'s' * (threads > 1)}"] = table(name, threads)
    path = save_results("peers", {"settings": results})
    if not options.settings:
        plot(results, path.with_suffix(".png"))


def table(name: str, threads: int) -> dict:
    """Print and return by contender: ms of forward and backward, of the forward alone, and MB."""
    seconds = _in_process("--threads", str(threads), "--time", name)
    heads = ("ms", "/ ours", "forward", "/ ours", "MB")
    print(f"\n{name}, {threads} thread{'s' * (threads > 1)}\n{'':>28}" + "".join(f"  {head:>8}" for head in heads))
    ours, rows = seconds[PURE], {}
    for contender, (both, forward) in seconds.items():
        row = {"ms": 1e3 * median(both), "ratio": median(both) / median(ours[0])}
        row |= {"forward_ms": 1e3 * median(forward), "forward_ratio": median(forward) / median(ours[1])}
        row["mb"] = _in_process("--threads", "1", "--memory", name, contender) if threads == 1 else float("nan")
        digits = zip(row.values(), (1, 2, 1, 2, 0), strict=True)
        print(f"{contender:>28}" + "".join(f"  {value:>8.{n}f}" for value, n in digits), flush=True)
        rows[contender] = row if threads == 1 else row | {"mb": None}
    return rows


def _in_process(*args: str):
    command = [sys.executable, "-m", "benchmarks", "peers", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def time_of(name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds by contender, with the backward pass and without. They take turns; the first round warms up."""
    family, sizes, contenders, rounds = (SETTINGS | FULL)[name]
    if torch.get_num_threads() > 1:
        contenders = [contender for contender in contenders if contender not in SLOW_TO_START]
    steps = {contender: STEPS[family](contender, **sizes) for contender in contenders}
    times = {contender: ([], []) for contender in steps}
    for round_ in range(rounds + 1):
        for contender, step in steps.items():
            for backward, found in zip((True, False), times[contender], strict=True):
                start = now()
                step(backward)
                if round_:
                    found.append(now() - start)
    return times


def memory_of(name: str, contender: str) -> float:
    """MB that two steps need beyond what there was before the first."""
    family, sizes, *_ = (SETTINGS | FULL)[name]
    step = STEPS[family](contender, **sizes)
    before = peak_memory()
    for _ in range(2):
        step(backward=True)
    return peak_memory() - before


def _forward_and_backward(
    run: Callable, parameters: list[torch.Tensor], shape: tuple, numba: bool = False
) -> Callable:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape)

    def step(backward: bool) -> None:
        with nullcontext() if numba else fused.disabled(), torch.set_grad_enabled(backward):
            y = run(x)
            if backward:
                torch.autograd.grad(y, [x, *parameters], weight)

    return step


def mamba_step(contender: str, L: int, n: int) -> Callable:
    torch.manual_seed(0)
    options = {"use_mambapy": contender == MAMBAPY, "use_associative_scan": contender == COMPILED}
    mixer = MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=n, num_hidden_layers=1, **options), 0).train()
    if contender in (PURE, NUMBA):
        use_fast_scans(mixer)
    if contender == PLAIN:
        use_fast_scans(mixer)
        mixer.forward = _with_reference(mixer.forward)
    run = torch.compile(mixer) if contender == COMPILED else mixer
    return _forward_and_backward(run, list(mixer.parameters()), (BATCH, L, WIDTH), numba=contender == NUMBA)


def _with_reference(forward: Callable) -> Callable:
    """`forward` with the plain loop in the place of the scan."""
    module = sys.modules[fast_scans.mamba_scan.__module__]

    def run(*args):
        module.gated_scan, scan = ops.gated_scan_reference, module.gated_scan
        try:
            return forward(*args)
        finally:
            module.gated_scan = scan

    return run


def mamba2_step(contender: str, L: int, n: int, chunk: int) -> Callable:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "state_size": n, "num_heads": 8, "head_dim": 64, "n_groups": 1, "chunk_size": chunk}
    mixer = Mamba2Mixer(Mamba2Config(num_hidden_layers=1, **sizes), 0).train()
    if contender in (PURE, NUMBA):
        use_fast_scans(mixer)
    return _forward_and_backward(mixer, list(mixer.parameters()), (BATCH, L, WIDTH), numba=contender == NUMBA)


def lru_step(contender: str, L: int, n: int, H: int, batch: int) -> Callable:
    """The recurrence alone, with the products around it."""
    torch.manual_seed(0)
    if contender == "matrix products alone":
        return _products(L, n, H, batch)
    lam = torch.polar(0.9 + 0.099 * torch.rand(n), 6 * torch.rand(n))
    weights = [lam.real.clone(), lam.imag.clone(), *(torch.randn(s) for s in ((n, H), (n, H), (H, n), (H, n)))]
    for weight in weights:
        weight.requires_grad_()
    scan = LRU_SCANS[contender]

    def run(u: torch.Tensor) -> torch.Tensor:
        return scan(u, *weights, final_state=False)[0]

    return _forward_and_backward(run, weights, (batch, L, H))


def _recurrence(*args, **kwargs) -> tuple:
    """The scan as it runs where the last state is wanted, too: not by a convolution."""
    return lru_scan(*args, **(kwargs | {"final_state": True}))


LRU_SCANS = {PURE: lru_scan, PLAIN: lru_scan_reference, "recurrence in chunks": _recurrence}


def _products(L: int, n: int, H: int, batch: int, gated: bool = False) -> Callable:
    """The products that the recurrence needs: B u, C h; their gradients; and B u again, as states are recomputed."""
    B, C = torch.randn(2 * n, H, requires_grad=True), torch.randn(H, 2 * n, requires_grad=True)
    block = nn.Linear(H, 2 * H) if gated else nn.Identity()

    def run(u: torch.Tensor) -> torch.Tensor:
        y = block(u.flatten(0, 1) @ B.t() @ C.t())
        return (y[:, :H] if gated else y).view_as(u)

    once = _forward_and_backward(run, [B, C, *block.parameters()], (batch, L, H))
    again = torch.randn(batch * L, H)

    def step(backward: bool) -> None:
        once(backward)
        if backward:
            again @ B.detach().t()

    return step


def lru_training_step(contender: str, L: int, n: int, H: int, batch: int) -> Callable:
    """A classifier of pixels with one block and its optimizer, but for the products alone."""
    torch.manual_seed(0)
    if contender == "matrix products alone":
        return _products(L, n, H, batch)
    config = MimoSSMConfig(hidden_size=H, state_size=n, num_hidden_layers=1, input_size=1, num_labels=10)
    model = MimoSSMForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    pixels, labels = torch.randn(batch, L, 1), torch.randint(10, (batch,))
    module = sys.modules[MimoSSMBlock.__module__]

    def step(backward: bool) -> None:
        scan, module.lru_scan = module.lru_scan, LRU_SCANS[contender]
        try:
            with torch.set_grad_enabled(backward):
                loss = model(input_values=pixels, labels=labels).loss
            if backward:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            module.lru_scan = scan

    return step


def lru_block_step(contender: str, L: int, n: int, H: int, batch: int) -> Callable:
    """A block: norm, recurrence, gated activation, residual."""
    torch.manual_seed(0)
    if contender == "matrix products alone":
        return _products(L, n, H, batch, gated=True)
    block = MimoSSMBlock(MimoSSMConfig(hidden_size=H, state_size=n, num_hidden_layers=1, vocab_size=8), 0).train()
    return _forward_and_backward(block, list(block.parameters()), (batch, L, H))


STEPS = {
    "mamba": mamba_step,
    "mamba2": mamba2_step,
    "lru": lru_step,
    "lru_training": lru_training_step,
    "lru_block": lru_block_step,
}


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {name: f"C{i}" for i, name in enumerate([PURE, NUMBA, LOOP, COMPILED, MAMBAPY, PLAIN])}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, varied, fixed, title in (
        (axes[0], "n", ("L", 256), "Mamba, 256 steps"),
        (axes[1], "L", ("n", 16), "Mamba, 16 states"),
    ):
        curves: dict[str, dict[int, float]] = {}
        for name, (family, sizes, *_) in (SETTINGS | FULL).items():
            rows = results.get(f"{name}, 1 thread")
            if rows and family == "mamba" and sizes[fixed[0]] == fixed[1]:
                for contender, row in rows.items():
                    curves.setdefault(contender, {}).setdefault(sizes[varied], row["ms"] / 1e3)
        for contender, points in curves.items():
            ax.loglog(*zip(*sorted(points.items()), strict=True), marker="o", label=contender, color=colors[contender])
        ax.set(title=title, xlabel={"n": "states", "L": "steps"}[varied], ylabel="s, forward and backward")
        ax.set_xticks(sorted({x for points in curves.values() for x in points}), minor=False)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.suptitle("One mixer of width 256, batch 8, one thread of an x86-64 CPU")
    figure.savefig(path, dpi=120)
    print(f"written to {path.name}")
