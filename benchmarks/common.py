"""What the benchmarks share: running an example as a user would, and dated results."""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]


def run_example(script: str, options: dict, log: Path) -> float:
    """Run an example in a process of its own; its output goes to a file.

    Args:
        script: in `examples/`.
        options: of its command line; a list becomes several values.
        log: where standard output and error go.

    Returns:
        Seconds.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, str(ROOT / "examples" / script)]
    for name, value in options.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    print("$", shlex.join(["python", f"examples/{script}", *command[2:]]), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.perf_counter() - start


def now() -> float:
    """Seconds: of the processor with one thread, which other programs do not lengthen; of the clock with several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_memory() -> float:
    """The most memory that this process has held, in MB; `ru_maxrss` would also count the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def save_results(name: str, results: dict, options: argparse.Namespace | None = None) -> Path:
    """Write results with date, machine and versions beside the benchmarks; `options` with their defaults filled in."""
    now = datetime.datetime.now(datetime.UTC)
    about = {
        "benchmark": name,
        "date": now.date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if options is not None:
        about["options"] = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    path = ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**about, **results}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")
    return path
