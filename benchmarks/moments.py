"""Carry the optimizer's moments through a reduction, or reset them? Paired runs on tinyshakespeare.

python -m benchmarks moments --seeds 0 1 2 --learning_rates 0.002 0.008
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from .common import run_example, save_results

EARLY = 25  # steps after the last reduction at which the runs are compared as well as at the end


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks moments", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 8e-3])
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moments"))
    options = parser.parse_args(args)
    rows = []
    for rate in options.learning_rates:
        for seed in options.seeds:
            row = {"learning_rate": rate, "seed": seed}
            for moments in ("carry", "reset"):
                output = options.output_dir / f"{moments}-{rate}-{seed}"
                row[moments] = run(moments, rate, seed, options.max_steps, output)
            rows.append(row)
            print(f"lr {rate:g}, seed {seed}: " + "; ".join(_text(row, k) for k in ("early", "final")), flush=True)
    for key in ("early", "final"):
        difference = mean(row["carry"][key] - row["reset"][key] for row in rows)
        wins = sum(row["carry"][key] < row["reset"][key] for row in rows)
        print(f"{key}: carry - reset = {difference:+.4f} nats on average; carry is better in {wins} of {len(rows)}")
    save_results("moments", {"runs": rows})


def run(moments: str, rate: float, seed: int, max_steps: int, output: Path) -> dict:
    """One run: evaluation loss soon after the last reduction and at the end, and the final sizes."""
    last = max_steps // 10 * 4  # reductions up to 40 % of the run, when the moments are well filled
    run_example(
        "pretrain_clm.py",
        {
            "output_dir": output,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 128,
            "sequence_length": 128,
            "max_steps": max_steps,
            "learning_rate": rate,
            "seed": seed,
            "moments": moments,
            "tolerance": 0.05,
            "start": last // 2,
            "end": last,
            "num_reductions": 2,
            "eval_strategy": "steps",
            "eval_steps": EARLY,
            "save_strategy": "steps",
            "save_steps": max_steps,
            "disable_tqdm": True,
        },
        log=output.with_suffix(".log"),
    )
    state = json.loads((output / f"checkpoint-{max_steps}" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    sizes = [layer["after"] for layer in _report(output)["events"][-1]["layers"]]
    return {"early": losses[last + EARLY], "final": losses[max_steps], "state_sizes": sizes}


def _report(output: Path) -> dict:
    return json.loads((output / "compression_report.json").read_text(encoding="utf-8"))


def _text(row: dict, key: str) -> str:
    return f"{key} carry {row['carry'][key]:.4f} reset {row['reset'][key]:.4f}"
