"""Language modelling at equal steps: large throughout, small from scratch, large to small in training.

Mamba or Mamba-2 on tinyshakespeare, byte by byte; the cut is spread over four events up to 10 % or 30 % of the steps.

    python -m benchmarks text_runs --model_type reducible_mamba2 --seeds 0 1 2
"""

import argparse
import json
import resource
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from .common import ROOT, run_example, save_results

HIDDEN_SIZE, LAYERS, SEQUENCE_LENGTH, BATCH = 64, 2, 256, 8
VALIDATION_FRACTION = 0.03  # little, because the runs that are cut validate twice more, and their time is compared
MODEL_TYPES = ["reducible_mamba2", "reducible_mamba"]
ARMS = {"large": None, "small": None, "cut by 10%": 0.1, "cut by 30%": 0.3}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks text_runs", description=__doc__.splitlines()[0])
    parser.add_argument("--model_type", choices=MODEL_TYPES, default=MODEL_TYPES[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--large", type=int, default=128)
    parser.add_argument("--small", type=int, default=8)
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/text_runs"))
    options = parser.parse_args(args)
    rows = []
    for seed in options.seeds:  # the arms take turns, so that a busy machine slows all of them
        for arm in options.arms:
            row = {"arm": arm, "seed": seed, **run_arm(arm, seed, options)}
            rows.append(row)
            print(f"{arm:>12}  seed {seed}  loss {row['loss']:.4f}  {row['cpu_seconds']:.0f} s of CPU", flush=True)
    for arm in options.arms:
        found = [row for row in rows if row["arm"] == arm]
        numbers = (mean(row[key] for row in found) for key in ("loss", "cpu_seconds", "seconds"))
        print(f"{arm:>12}  loss {{:.4f}}  {{:.0f}} s of CPU  {{:.0f}} s, {len(found)} seeds".format(*numbers))
    path = save_results(f"text_runs-{options.model_type}", {"runs": rows}, options)
    plot(rows, options.model_type, path.with_suffix(".png"))


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> dict:
    """One training run: validation loss at the end and on the way, wall-clock and CPU time of the whole process."""
    output = options.output_dir / options.model_type / f"{arm.replace(' ', '-').replace('%', '')}-{seed}"
    before = _cpu_seconds()
    seconds = run_example(
        "pretrain_clm.py",
        {
            "output_dir": output,
            "model_type": options.model_type,
            "hidden_size": HIDDEN_SIZE,
            "num_hidden_layers": LAYERS,
            "state_size": options.small if arm == "small" else options.large,
            "sequence_length": SEQUENCE_LENGTH,
            "validation_fraction": VALIDATION_FRACTION,
            "per_device_train_batch_size": BATCH,
            "max_steps": options.max_steps,
            "seed": seed,
            **({"target_state_size": options.small, "end": ARMS[arm]} if ARMS[arm] else {"do_compress": False}),
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": options.max_steps,
            "logging_steps": options.max_steps // 20,
            "disable_tqdm": True,
        },
        log=output.with_suffix(".log"),
    )
    cpu_seconds = _cpu_seconds() - before
    lines = output.with_suffix(".log").read_text(encoding="utf-8").splitlines()
    loss = next(line for line in lines if line.startswith("validation loss (nats per byte)")).split()[-1]
    state = json.loads((output / f"checkpoint-{options.max_steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    curve = [{"step": e["step"], "loss": float(e["loss"])} for e in state["log_history"] if "loss" in e]
    return {"loss": float(loss), "seconds": seconds, "cpu_seconds": cpu_seconds, "training_loss": curve}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Training loss over the steps, mean over the seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        steps = [point["step"] for point in found[0]["training_loss"]]
        losses = [mean(p["loss"] for p in each) for each in zip(*(r["training_loss"] for r in found), strict=True)]
        axes.plot(steps, losses, label=f"{arm}: {mean(row['loss'] for row in found):.3f} on validation data")
    axes.set(xlabel="step", ylabel="training loss (nats per byte)", ylim=(None, 2.5), title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    print(f"drawn in {path.relative_to(ROOT)}")
