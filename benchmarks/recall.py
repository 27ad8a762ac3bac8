"""Associative recall: when does cutting the state pay, and do the Hankel singular values show it in time?

A sequence holds pairs of a key and a value, and then each key again, in another order: the model is asked for its
value (multi-query associative recall; Arora et al., *Zoology*, ICLR 2024, arXiv 2312.04927). A Mamba-2 is trained
large throughout, small from scratch, and large, then cut to the small size at a fraction of the steps.

    python -m benchmarks recall --seeds 0 1 2
"""

import argparse
import math
import time
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import nn

from hf_compressm import ReducibleMamba2Config, ReducibleMamba2ForCausalLM, compress, hankel_singular_values

from .common import ROOT, save_results

HIDDEN_SIZE, LAYERS, HEAD_DIM = 64, 1, 32
CALIBRATION_BATCHES = 4
SPECTRA = 20  # how often the Hankel singular values are looked at


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recall", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--large", type=int, default=32)
    parser.add_argument("--small", type=int, default=8)
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="fractions of the steps")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=16, help="different keys, and different values")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        for cut in [None, 0.0, *options.cuts]:
            row = {"arm": _name(cut), "cut": cut, "seed": seed, **train(cut, seed, options)}
            rows.append(row)
            print(
                f"{row['arm']:>12}  seed {seed}  accuracy {row['accuracy']:.2%}  loss {row['loss']:.4f}  "
                f"{row['cpu_seconds']:.0f} s of CPU",
                flush=True,
            )
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        print(f"{arm:>12}  mean accuracy {mean(row['accuracy'] for row in found):.2%} over {len(found)} seeds")
    path = save_results("recall", {"runs": rows}, options)
    plot(rows, options, path.with_suffix(".png"))


def _name(cut: float | None) -> str:
    return {None: "large", 0.0: "small"}.get(cut, f"cut at {cut or 0:.0%}")


def make_batch(rows: int, pairs: int, symbols: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Keys are the tokens below `symbols`, values those above; labels are the values asked for, -100 elsewhere."""
    keys, values = (torch.rand(rows, symbols, generator=generator).argsort(1)[:, :pairs] for _ in range(2))
    order = torch.rand(rows, pairs, generator=generator).argsort(1)
    told = torch.stack([keys, values + symbols], 2).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order) + symbols], 2).flatten(1)
    labels = torch.full((rows, 4 * pairs), -100)
    labels[:, 2 * pairs + 1 :: 2] = asked[:, 1::2]
    return {"input_ids": torch.cat([told, asked], 1), "labels": labels}


def train(cut: float | None, seed: int, options: argparse.Namespace) -> dict:
    """One run; `cut` is the fraction of the steps at which the state is cut, None for never and 0 for small always."""
    started = time.process_time()
    torch.manual_seed(seed)
    config = ReducibleMamba2Config(
        vocab_size=2 * options.symbols,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        state_size=options.small if cut == 0 else options.large,
        head_dim=HEAD_DIM,
        num_heads=2 * HIDDEN_SIZE // HEAD_DIM,
        n_groups=1,
        use_cache=False,
    )
    model = ReducibleMamba2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 50) * (1 + math.cos(math.pi * k / options.steps)) / 2
    )
    data, held_out = (torch.Generator().manual_seed(1000 * seed + k) for k in (1, 2))
    test = [make_batch(options.batch, options.pairs, options.symbols, held_out) for _ in range(8)]
    recent, curve, spectra = [], [], []
    for step in range(1, options.steps + 1):
        batch = make_batch(options.batch, options.pairs, options.symbols, data)
        recent = [*recent[1 - CALIBRATION_BATCHES :], batch]
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if cut is None and step % (options.steps // SPECTRA) == 0:
            spectra.append({"step": step, "energy": kept_energy(model, recent, options.small)})
        if cut and step == round(cut * options.steps):
            before = accuracy(model, test[:2])
            compress(model, target_state_size=options.small, optimizer=optimizer, dataloader=recent)
            spectra.append({"step": step, "accuracy_before": before, "accuracy_after": accuracy(model, test[:2])})
        if step % (options.steps // SPECTRA) == 0:
            curve.append({"step": step, "accuracy": accuracy(model, test[:2])})
    with torch.no_grad():
        loss = mean(float(model(**batch).loss) for batch in test)
    found = {"loss": loss, "accuracy": accuracy(model, test), "curve": curve, "events": spectra}
    return found | {"cpu_seconds": time.process_time() - started}


@torch.no_grad()
def accuracy(model: nn.Module, data: list[dict]) -> float:
    """Fraction of the values asked for that are the likeliest token."""
    right, asked = 0, 0
    for batch in data:
        guesses, labels = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        right += int((guesses == labels)[labels != -100].sum())
        asked += int((labels != -100).sum())
    return right / asked


def kept_energy(model: nn.Module, data: list[dict], r: int) -> list[float]:
    """`sum_{i<=r} sigma_i^2 / sum sigma_i^2` of each layer."""
    squares = [hsv.square() for hsv in hankel_singular_values(model, data).values()]
    return [float(each[:r].sum() / each.sum()) for each in squares]


def plot(rows: list[dict], options: argparse.Namespace, path: Path) -> None:
    """Accuracy over the steps of every arm, and the energy beyond the small size in the large one."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, energies = figure.subplots(1, 2)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row["curve"] for row in rows if row["arm"] == arm]
        steps = [point["step"] for point in found[0]]
        curves.plot(steps, [mean(p["accuracy"] for p in each) for each in zip(*found, strict=True)], label=arm)
    curves.set(
        xlabel="step", ylabel="accuracy", title=f"{options.pairs} pairs, {options.large}→{options.small} states"
    )
    curves.legend(fontsize="small")
    large = [row["events"] for row in rows if row["cut"] is None]
    for layer in range(LAYERS):
        steps = [point["step"] for point in large[0]]
        lost = [mean(1 - p["energy"][layer] for p in each) for each in zip(*large, strict=True)]
        energies.plot(steps, lost, label=f"layer {layer}")
    share = "share of Σσ² beyond the small size"
    energies.set(xlabel="step", ylabel=share, title="large throughout", ylim=(0, None))
    energies.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    print(f"drawn in {path.relative_to(ROOT)}")
