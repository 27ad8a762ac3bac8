"""What the convolution and the recurrence of a MIMO state space model cost: the numbers by which `lru_scan` chooses.

Forward and backward of both over a grid of shapes; non-negative least squares of the relative errors. The numbers
belong into `hf_compressm/ops/lru_convolution.py`.

    OMP_NUM_THREADS=1 python -m benchmarks lru_cost
"""

import argparse
import itertools
import time

import numpy as np
import torch
from scipy.optimize import nnls

from hf_compressm.ops import lru, lru_convolution

from .common import save_results

GRID = {"batch": [4, 50], "length": [100, 784, 2000], "n": [16, 64, 256], "width": [2, 8, 32, 64]}
WORK = {"convolution": lru_convolution.convolution_work, "recurrence": lru_convolution.recurrence_work}
SMALL = 2.5e7  # numbers in the states of a shape that is measured


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lru_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    shapes = [shape for shape in itertools.product(*GRID.values()) if np.prod(shape[:3]) <= SMALL]
    rows = []
    for shape in shapes:
        times = measure(*shape, options.rounds)
        rows.append({**dict(zip(GRID, shape, strict=True)), **times})
        print("  ".join(f"{k} {v:.3g}" for k, v in rows[-1].items()), flush=True)
    costs, predicted = {}, {}
    for name, work in WORK.items():
        works = [work(*shape, shape[-1]) for shape in shapes]
        seconds = np.array([row[name] for row in rows])
        matrix = np.array([list(w.values()) for w in works]) / seconds[:, None]
        found, _ = nnls(matrix, np.full(len(seconds), 1e9))
        costs[name] = {key: float(f"{cost:.2g}") for key, cost in zip(works[0], found, strict=True)}
        predicted[name] = matrix @ list(costs[name].values()) * seconds / 1e9
        ratios = predicted[name] / seconds
        print(f"{name}: {costs[name]}, predicted / measured {ratios.min():.2f} to {ratios.max():.2f}")
    chosen = ["convolution" if c < r else "recurrence" for c, r in zip(*predicted.values(), strict=True)]
    lost = [row[name] / min(row[k] for k in WORK) for row, name in zip(rows, chosen, strict=True)]
    print(f"the choice is right for {lost.count(1)} of {len(lost)} shapes, and costs at most {max(lost):.2f}x")
    save_results("lru_cost", {"nanoseconds": costs, "shapes": rows, "worst_choice": max(lost)})


def measure(batch: int, length: int, n: int, width: int, rounds: int) -> dict[str, float]:
    """Least processor seconds of forward and backward, both ways, in turns."""
    torch.manual_seed(0)
    u, w_in, w_out = (torch.randn(s) for s in ((batch, length, width), (2 * n, width), (width, 2 * n)))
    lam = torch.view_as_real(torch.polar(torch.full((n,), 0.99), 6 * torch.rand(n)))
    inputs = [x.requires_grad_() for x in (u, lam, w_in, w_out)]
    weight = torch.randn(batch, length, width)
    times = {"convolution": [], "recurrence": []}
    for _ in range(rounds):
        for name, found in times.items():
            start = time.process_time()
            if name == "convolution":
                y = lru_convolution.convolve(*inputs, None)
            else:
                y, *_ = lru._scan(*inputs, None, None, lru.CHUNK_SIZE)
            torch.autograd.grad(y, inputs, weight)
            found.append(time.process_time() - start)
    return {name: min(found) for name, found in times.items()}
