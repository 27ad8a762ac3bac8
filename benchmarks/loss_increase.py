"""How much loss a reduction costs at once, without any training after it, next to other ways to choose what to keep.

Trains Mamba and Mamba-2 on tinyshakespeare, byte by byte, unless the models are there, and reduces each to a half, a
quarter and an eighth of its states.

    python -m benchmarks loss_increase --seeds 0 1 2
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import nn

from hf_compressm import compress
from hf_compressm.reducers import StateReducer, find_reducible

from ._baselines import SCORES, lti_surrogate, mamba2_statistics, mamba_statistics, select, truncate_surrogate
from ._trained import STATE_SIZE, calibration, load, loss, trained_model, validation
from .common import ROOT, save_results

MODELS = {"reducible_mamba": mamba_statistics, "reducible_mamba2": mamba2_statistics}
OURS, COMPENSATED, RANDOM, SURROGATE = "ours", "ours, selection", "random", "LTI surrogate"
PLAIN = [RANDOM, *SCORES]
DIVISORS = (2, 4, 8)
REQUIRED = {2: 1 / 3, 8: 1 / 2}  # of the best plain selection's increase, or an increase below
NEGLIGIBLE = 0.002  # nats


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loss_increase", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=3, help="of the random selection")
    parser.add_argument("--calibration_batches", type=int, default=4)
    parser.add_argument("--validation_sequences", type=int, default=64)
    parser.add_argument("--model_dir", type=Path, default=Path("outputs/trained"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    for model_type in options.models:
        rows = []
        for seed in options.seeds:
            started = time.process_time()
            path = trained_model(model_type, seed, options.model_dir)
            row = measure(path, model_type, seed, options)
            rows.append({"model": model_type, "seed": seed, **row, "cpu_seconds": time.process_time() - started})
            print(f"{model_type}, seed {seed}: loss {row['loss']:.4f}, {rows[-1]['cpu_seconds']:.0f} s of CPU")
            print_table(row["increase"])
        average = _means([row["increase"] for row in rows])
        print(f"{model_type}, mean of {len(rows)} seeds")
        print_table(average)
        for divisor, verdict in verdicts(average).items():
            print(f"  n/{divisor}: {verdict}")
        path = save_results(f"loss_increase-{model_type}", {"mean": average, "runs": rows}, options)
        plot(rows, STATE_SIZE[model_type], path.with_suffix(".png"))


def measure(path: Path, model_type: str, seed: int, options: argparse.Namespace) -> dict:
    """Loss of a trained model, and by how much every reduction raises it, {n/r: {method: nats}}."""
    train, held_out = calibration(options.calibration_batches, seed), validation(options.validation_sequences)
    model = load(path)
    before, inputs = loss(model, held_out), layer_inputs(model, train)
    statistics = {
        name: MODELS[model_type](module, inputs[name]) for name, (module, _) in find_reducible(model).items()
    }
    surrogates = {name: lti_surrogate(each) for name, each in statistics.items()}
    generator = torch.Generator().manual_seed(seed)
    increase, kept_by_surrogate = {}, {}

    def after(change: Callable[[nn.Module], None]) -> float:
        reduced = load(path)
        change(reduced)
        return loss(reduced, held_out) - before

    def each_layer(reduce: Callable[[str, StateReducer], object]) -> Callable[[nn.Module], None]:
        def change(model: nn.Module) -> None:
            for name, (module, reducer_class) in find_reducible(model).items():
                reducer = reducer_class(module)
                with torch.no_grad():
                    reducer.apply(reduce(name, reducer))

        return change

    for divisor in DIVISORS:
        r = STATE_SIZE[model_type] // divisor
        found = {
            OURS: after(lambda m, r=r: compress(m, target_state_size=r, dataloader=train)),
            COMPENSATED: after(lambda m, r=r: compress(m, target_state_size=r, dataloader=train, method="selection")),
        }
        draws = [
            after(each_layer(lambda _, red, r=r: select(red, torch.randperm(red.state_size, generator=generator)[:r])))
            for _ in range(options.draws)
        ]
        found[RANDOM] = mean(draws)
        for name, score in SCORES.items():
            found[name] = after(
                each_layer(lambda layer, red, s=score, r=r: select(red, s(statistics[layer]).topk(r).indices))
            )
        found[SURROGATE] = after(each_layer(lambda layer, red, r=r: truncate_surrogate(red, surrogates[layer], r)))
        kept_by_surrogate[divisor] = [min(r, surrogate.rank) for surrogate in surrogates.values()]
        increase[divisor] = found
    return {"loss": before, "increase": increase, "states_of_surrogate": kept_by_surrogate}


def layer_inputs(model: nn.Module, data: list[dict]) -> dict[str, torch.Tensor]:
    """What each reducible layer reads in some batches, (sequences, L, hidden_size)."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in find_reducible(model)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, parts=parts: parts.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for name, parts in seen.items()
    ]
    loss(model, data)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def verdicts(increase: dict) -> dict[int, str]:
    """What was asked for, and whether it holds."""
    texts = {}
    for divisor, factor in REQUIRED.items():
        found = increase[divisor]
        name, best = min(((name, found[name]) for name in PLAIN), key=lambda pair: pair[1])
        holds = found[OURS] <= max(factor * best, NEGLIGIBLE)
        texts[divisor] = (
            f"ours {found[OURS]:.4f}, best plain selection {best:.4f} ({name}), ratio {found[OURS] / best:.2f}; "
            f"asked for {factor:.2f} or {NEGLIGIBLE} nats: {'holds' if holds else 'does not hold'}"
        )
    return texts


def print_table(increase: dict) -> None:
    print(f"{'':>18}" + "".join(f"{'n/' + str(divisor):>9}" for divisor in increase))
    for method in increase[DIVISORS[0]]:
        print(f"{method:>18}" + "".join(f"{found[method]:>9.4f}" for found in increase.values()), flush=True)


def _means(increases: list[dict]) -> dict:
    first = increases[0]
    return {d: {m: mean(each[d][m] for each in increases) for m in first[d]} for d in first}


def plot(rows: list[dict], n: int, path: Path) -> None:
    """Mean over the seeds, and each seed as a dot; `n` is the full size."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    increases = [row["increase"] for row in rows]
    average = _means(increases)
    for method in average[DIVISORS[0]]:
        style = {"lw": 2.5} if method == OURS else {"lw": 1.2, "ls": "-" if method == COMPENSATED else "--"}
        line = axes.plot(range(len(DIVISORS)), [average[d][method] for d in DIVISORS], label=method, **style)[0]
        for each in increases:
            axes.plot(range(len(DIVISORS)), [each[d][method] for d in DIVISORS], ".", color=line.get_color(), ms=4)
    axes.set_xticks(range(len(DIVISORS)), [f"{n}→{n // d}" for d in DIVISORS])
    axes.set(xlabel="states", ylabel="loss increase (nats per byte)", yscale="log", title=rows[0]["model"])
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=130)
    print(f"drawn in {path.relative_to(ROOT)}")
