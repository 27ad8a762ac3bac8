"""Sequential MNIST: large throughout, large to small in training, and small from scratch.

python -m benchmarks smnist --data_dir DIRECTORY_OF_PARQUET --seeds 0
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from .common import run_example, save_results

ARMS = ("large", "compressed", "small")


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks smnist", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="train*.parquet and test*.parquet of MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_steps", type=int, default=4800)
    parser.add_argument("--state_size", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smnist"))
    options = parser.parse_args(args)
    rows = []
    for seed in options.seeds:
        final_sizes = None
        for arm in options.arms:
            if arm == "small":
                final_sizes = final_sizes or _results(options.output_dir / f"compressed-{seed}")["state_sizes"]
            row = run_arm(arm, seed, final_sizes, options)
            rows.append(row)
            final_sizes = row["state_sizes"] if arm == "compressed" else final_sizes
            print(f"{arm:>10}  seed {seed}  accuracy {row['accuracy']:.2%}  states {row['state_sizes']}", flush=True)
    for arm in options.arms:
        accuracies = [row["accuracy"] for row in rows if row["arm"] == arm]
        print(f"{arm:>10}  mean accuracy {mean(accuracies):.2%} over {len(accuracies)} seeds")
    save_results(f"smnist-{'-'.join(options.arms)}-seed-{'-'.join(map(str, options.seeds))}", {"runs": rows})


def run_arm(arm: str, seed: int, final_sizes: list[int] | None, options: argparse.Namespace) -> dict:
    """One training run; `final_sizes` are those of the small arm."""
    output = options.output_dir / f"{arm}-{seed}"
    run_example(
        "classify_sequences.py",
        {
            "data_dir": options.data_dir,
            "output_dir": output,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "state_size": final_sizes if arm == "small" else [options.state_size],
            "config_overrides": json.dumps({"r_min": 0.9, "r_max": 0.999, "max_phase": 0.314}),
            "do_compress": arm == "compressed",
            "tolerance": options.tolerance,
            "max_steps": options.max_steps,
            "seed": seed,
            "disable_tqdm": True,
        },
        log=output.with_suffix(".log"),
    )
    return {"arm": arm, **_results(output)}


def _results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))
