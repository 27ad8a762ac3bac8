"""Kill runs with SIGKILL at random moments, resume them, and compare with the uninterrupted ones bit for bit.

python -m benchmarks kills --kills 100 --seed 0

Every run is forked from this process, which has imported everything and never trains. Half of the moments are aimed at
an interval in which something is under way (a save, a reduction, a snapshot, an evaluation with its decision, a step
whose batches calibrate a reduction), half are anywhere in the run. What the killed process was doing is told by the
last marks that it wrote, not by what was aimed at.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compressm import (
    CompreSSMCallback,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
)
from hf_compressm.training import callback as callback_module
from hf_compressm.training.checkpoint import last_whole_checkpoint
from hf_compressm.training.rollback import Rollback
from hf_compressm.training.snapshot import FOLDER, SnapshotStore

from .common import ROOT, save_results

TIMEOUT = 120  # seconds of one run
STEPS = 14
EVENTS = {"start": 3, "end": 9, "num_reductions": 2}  # after steps 6 and 9
DIFFERENT = ("runtime", "per_second", "seconds", "step_ms", "flos", "output_dir")  # parts of names of what may differ


class Text(Dataset):
    """Windows of bytes of the text that the examples ship."""

    def __init__(self, length: int = 32, count: int = 128):
        data = (ROOT / "examples" / "data" / "tinyshakespeare.txt").read_bytes()[: length * count]
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().reshape(count, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def mimo_ssm():
    return MimoSSMForCausalLM(MimoSSMConfig(vocab_size=256, hidden_size=8, state_size=16, num_hidden_layers=2))


def mamba2():
    sizes = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 16}
    return ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**sizes, num_heads=2, head_dim=8, n_groups=1))


# What the runs do: a search by measured loss whose result stays; a reduction that the evaluation takes back; observed
# layers that gain parameters.
SCENARIOS = {
    "mimo_ssm, measured loss": (mimo_ssm, {"max_loss_increase": 0.02, "calibration_batches": 2}),
    "mimo_ssm, taken back": (mimo_ssm, {"target_state_size": 1, "rollback_metric": "loss", "rollback_tolerance": 0.0}),
    "reducible_mamba2, judged": (
        mamba2,
        {"reduction_fraction": 0.5, "calibration_batches": 2, "rollback_metric": "loss", "rollback_tolerance": 0.5},
    ),
}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the runs have seeds 0, 1, 2, ...")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time, with fewer kills")
    parser.add_argument("--run_seeds", type=int, default=2, help="uninterrupted runs of each kind to compare with")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        straight = {}
        for name in SCENARIOS:
            for seed in range(options.run_seeds):
                path = Path(folder) / f"straight-{len(straight)}"
                marks, died = run(name, seed, path)
                if died:
                    raise RuntimeError(f"the uninterrupted run of {name!r} failed; see {path.with_suffix('.log')}")
                straight[name, seed] = path, marks
        while len(rows) < options.kills and time.perf_counter() - started < 60 * options.minutes:
            name, seed = list(straight)[len(rows) % len(straight)]
            reference, marks = straight[name, seed]
            row = kill_and_resume(name, seed, reference, marks, draw, Path(folder) / "killed")
            if row is not None:
                rows.append(row)
                print(
                    f"{len(rows):4d}  {name:26}  step {row['step']:2d}  {row['phase']:12}  {row['result']}", flush=True
                )
    phases = Counter(row["phase"] for row in rows)
    results = Counter(row["result"] for row in rows)
    print(f"{len(rows)} kills in {time.perf_counter() - started:.0f} s: {dict(results)}; while {dict(phases)}")
    save_results("kills", {"seed": options.seed, "results": results, "phases": phases, "kills": rows})


def kill_and_resume(
    name: str, seed: int, reference: Path, marks: list[dict], draw: random.Random, path: Path
) -> dict | None:
    """One killed and resumed run; None if it ended before it could be killed."""
    shutil.rmtree(path, ignore_errors=True)
    kinds = sorted({mark["phase"] for mark in marks})
    kind = draw.choice(kinds) if draw.random() < 0.5 else None
    aim = draw.choice([mark for mark in marks if kind in (None, mark["phase"])])
    seen, died = run(name, seed, path, kill=(aim, draw.uniform(0, aim["duration"])))
    if not died:
        return None
    incomplete = sum(not (c / "trainer_state.json").is_file() for c in path.glob("checkpoint-*"))
    _, failed = run(name, seed, path, resume=True)
    under_way = [mark["phase"] for mark in seen if "duration" not in mark]
    return {
        "run": name,
        "run_seed": seed,
        "phase": under_way[-1] if under_way else "in between",
        "step": seen[-1]["step"],
        "aimed_at": aim["phase"],
        "checkpoints_without_state": incomplete,
        "result": "failed: " + path.with_suffix(".log").read_text()[-500:] if failed else difference(reference, path),
    }


def run(name: str, seed: int, path: Path, kill: tuple[dict, float] | None = None, resume: bool = False):
    """One run in a forked process.

    Args:
        name: of the scenario.
        seed: of the run.
        path: its output directory.
        kill: the mark after which to kill it, and how many seconds after.
        resume: from the last whole checkpoint, if there is one.

    Returns:
        The marks that it wrote, with the seconds between begin and end of each, and whether it did not end by itself.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            train(name, seed, path, writer, resume)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    marks, text, deadline = [], b"", time.monotonic() + TIMEOUT
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while time.monotonic() < deadline and select.select([pipe], [], [], deadline - time.monotonic())[0]:
            if not (part := pipe.read(65536)):
                break
            text += part
            lines = text.split(b"\n")
            text = lines.pop()
            for line in lines:
                _take(marks, json.loads(line))
                if kill is not None and _same(marks[-1], kill[0]) and "duration" not in marks[-1]:
                    time.sleep(kill[1])
                    os.kill(child, signal.SIGKILL)
                    kill = None
        else:
            os.kill(child, signal.SIGKILL)
    return marks, os.waitpid(child, 0)[1] != 0


def _same(one: dict, other: dict) -> bool:
    return one["phase"] == other["phase"] and one["step"] == other["step"]


def _take(marks: list[dict], mark: dict) -> None:
    """Note a begin, or the end of what has begun."""
    if mark.pop("begin"):
        marks.append(mark)
    else:
        open_ = next(m for m in reversed(marks) if _same(m, mark) and "duration" not in m)
        open_["duration"] = mark["time"] - open_["time"]


def train(name: str, seed: int, path: Path, pipe: int, resume: bool) -> None:
    """The run itself, which marks what it is doing."""
    make_model, rule = SCENARIOS[name]
    torch.manual_seed(seed)
    arguments = TrainingArguments(
        str(path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=6,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    callback = CompreSSMCallback(**rule, **EVENTS)
    data = {"train_dataset": Text(), "eval_dataset": Text(count=8)}
    trainer = Trainer(model=make_model(), args=arguments, callbacks=[callback], **data)

    @contextmanager
    def marked(phase: str):
        for begin in (True, False):
            mark = {"phase": phase, "step": trainer.state.global_step, "begin": begin, "time": time.monotonic()}
            os.write(pipe, json.dumps(mark).encode() + b"\n")
            if begin:
                yield

    def wrap(owner: Any, attribute: str, phase: str) -> None:
        original = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            with marked(phase):
                return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calibrating = callback._calibration._started
            self.step = marked("calibrating" if calibrating else "step")
            self.step.__enter__()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.step.__exit__(None, None, None)

    trainer.add_callback(Steps())
    wrap(callback_module, "compress_once", "reduction")
    wrap(SnapshotStore, "write", "snapshot")
    wrap(Rollback, "judge", "decision")
    wrap(trainer, "_save_checkpoint", "save")
    if resume:
        try:
            last_whole_checkpoint(path)
        except ValueError:
            resume = False
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def difference(one: Path, other: Path) -> str:
    """What differs between two output directories; "equal" if nothing does.

    Which old checkpoints are kept can differ, and is told: transformers deletes those that were changed first, and one
    that it was deleting when it was killed was changed last.
    """
    kept = [{path.name for path in directory.glob("checkpoint-*")} for directory in (one, other)]
    files = [_files(directory, kept[0] & kept[1]) for directory in (one, other)]
    if files[0] != files[1]:
        return f"files differ: {sorted(files[0] ^ files[1])}"
    different = sorted(name for name in files[0] if not _equal(one / name, other / name))
    if different:
        return f"contents differ: {different}"
    return "equal" if kept[0] == kept[1] else "equal, but other old checkpoints are kept"


def _files(directory: Path, checkpoints: set[str]) -> set[str]:
    """Names of the files in some checkpoints and outside of all, but for the snapshots that belong to others.

    A file that safetensors was writing beside a checkpoint's when it was killed stays there, and does not matter.
    """
    first = min((int(name.removeprefix("checkpoint-")) for name in checkpoints), default=0)
    found = set()
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        in_another = name.parts[0].startswith("checkpoint-") and name.parts[0] not in checkpoints
        of_another = name.match(f"{FOLDER}/step-*") and int(name.stem.removeprefix("step-")) < first
        if path.is_file() and not (in_another or of_another or name.match("checkpoint-*/.tmp*")):
            found.add(str(name))
    return found


def _equal(one: Path, other: Path) -> bool:
    if one.name == "training_args.bin":
        return True  # holds the path
    if one.suffix in (".pt", ".pth"):
        return _same_values(*(torch.load(path, weights_only=False) for path in (one, other)))
    if one.suffix == ".safetensors":  # the order of their metadata is arbitrary
        return _same_values(*({**safe_open(path, "pt").metadata(), **load_file(path)} for path in (one, other)))
    if one.suffix == ".json":
        first, second = (_comparable(json.loads(path.read_text())) for path in (one, other))
        return first == second
    return one.read_bytes() == other.read_bytes()


def _same_values(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_values(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same_values, one, other))
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other))) if hasattr(one, "shape") else one == other


def _comparable(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {k: _comparable(v) for k, v in entry.items() if not any(part in k for part in DIFFERENT)}
    return [_comparable(item) for item in entry] if isinstance(entry, list) else entry
