"""Whether decomposing the matrices of all layers in one batch pays, against one by one: float64, one thread.

python -m benchmarks decompositions
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from .common import now, save_results

SIZES = {16: 256, 64: 64, 128: 24, 256: 8}  # size of a matrix: how many
ROUNDS = 5


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decompositions", description=__doc__.splitlines()[0])
    parser.parse_args(args)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size, count in SIZES.items():
        roots = torch.randn(count, size, size, dtype=torch.float64)
        gramians = roots @ roots.mT
        for name in ("eigh", "svd", "cholesky"):
            decompose = getattr(torch.linalg, name)
            batch, single = fastest(partial(decompose, gramians), partial(one_by_one, decompose, gramians))
            rows.append({"size": size, "count": count, "of": name, "batch_ms": 1e3 * batch, "single_ms": 1e3 * single})
            print(f"{count:4d} of size {size:4d}, {name:>8}: {1e3 * batch:6.1f} ms, one by one {single / batch:5.2f}×")
    save_results("decompositions", {"rows": rows})


def one_by_one(decompose: Callable, matrices: torch.Tensor) -> None:
    for matrix in matrices:
        decompose(matrix)


def fastest(*runs: Callable) -> list[float]:
    """Seconds of each, which take turns; the first round warms up."""
    times = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            start = now()
            run()
            found.append(now() - start)
    return [min(found[1:]) for found in times]
