"""Does `max_loss_increase` hold on data that was not calibrated on?

Models as in `loss_increase` and a MIMO SSM, each reduced once for every limit; the increase is measured on validation
data, and for comparison on the calibration batches that the search saw.

    python -m benchmarks loss_limit --seeds 0
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from hf_compressm import compress

from ._trained import STATE_SIZE, calibration, load, loss, trained_model, validation
from .common import ROOT, save_results

REQUIRED = 1.5  # mean of increase over limit


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loss_limit", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=STATE_SIZE, default=list(STATE_SIZE))
    parser.add_argument("--limits", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration_batches", type=int, default=4, help="of 8 sequences of 256 bytes")
    parser.add_argument("--validation_sequences", type=int, default=128)
    parser.add_argument("--model_dir", type=Path, default=Path("outputs/trained"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = []
    for model_type in options.models:
        for seed in options.seeds:
            path = trained_model(model_type, seed, options.model_dir)
            seen, unseen = calibration(options.calibration_batches, seed), validation(options.validation_sequences)
            before = [loss(load(path), data) for data in (seen, unseen)]
            for limit in options.limits:
                started = time.process_time()
                model = load(path)
                report = compress(
                    model,
                    max_loss_increase=limit,
                    dataloader=seen,
                    calibration_batches=options.calibration_batches,
                )
                seconds = time.process_time() - started
                on_seen, on_unseen = (
                    loss(model, data) - old for data, old in zip((seen, unseen), before, strict=True)
                )
                row = {"model": model_type, "seed": seed, "limit": limit, "seen": on_seen, "unseen": on_unseen}
                row |= {"states": [layer.after for layer in report.events[0].layers], "cpu_seconds": seconds}
                rows.append(row)
                print(
                    f"{model_type:>16}  seed {seed}  limit {limit:.3f}  seen {on_seen:.4f}  unseen {on_unseen:.4f}  "
                    f"ratio {on_unseen / limit:.2f}  states {row['states']}  {seconds:.0f} s of CPU",
                    flush=True,
                )
    ratios = [row["unseen"] / row["limit"] for row in rows]
    print(f"mean ratio {mean(ratios):.2f} over {len(ratios)} cases, at most {max(ratios):.2f}; asked for {REQUIRED}")
    path = save_results("loss_limit", {"runs": rows}, options)
    plot(rows, path.with_suffix(".png"))


def plot(rows: list[dict], path: Path) -> None:
    """Increase over limit, with the diagonal."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    limits = sorted({row["limit"] for row in rows})
    axes.plot(limits, limits, "k-", lw=1, label="limit")
    axes.plot(limits, [REQUIRED * limit for limit in limits], "k:", lw=1, label=f"{REQUIRED} × limit")
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model]
        line = axes.plot([row["limit"] for row in found], [row["unseen"] for row in found], "o", label=model)[0]
        axes.plot([row["limit"] for row in found], [row["seen"] for row in found], "_", color=line.get_color(), ms=12)
    axes.plot([], [], "k_", label="on the calibration batches")
    axes.set(xlabel="max_loss_increase", ylabel="loss increase on unseen data (nats per byte)")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(limits, [f"{limit:g}" for limit in limits])
        axis.set_minor_formatter("")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    print(f"drawn in {path.relative_to(ROOT)}")
