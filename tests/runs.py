"""Short runs of the stock Trainer for the tests."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from tiny import Windows, tiny_lm
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback

TIMES = ("runtime", "per_second", "seconds", "flos", "step_ms", "command")  # in names of what differs from run to run


def arguments(path, **options):
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(str(path), **{**defaults, **options})


def make_trainer(path, model=None, callbacks=None, optimizers=(None, None), **options):
    model = tiny_lm(state_size=32) if model is None else model
    callbacks = [CompreSSMCallback(tolerance=0.1, end=0.4)] if callbacks is None else callbacks
    data = {"train_dataset": Windows(), "eval_dataset": Windows(count=8)}
    return Trainer(model=model, args=arguments(path, **options), callbacks=callbacks, optimizers=optimizers, **data)


def without_times(entry):
    """What JSON holds, without how long things took."""
    if isinstance(entry, dict):
        return {k: without_times(v) for k, v in entry.items() if not any(part in k for part in TIMES)}
    return [without_times(item) for item in entry] if isinstance(entry, list) else entry


def trainer_state(checkpoint: Path) -> dict:
    """`trainer_state.json` without times and places."""
    state = without_times(json.loads((checkpoint / "trainer_state.json").read_text()))
    for callback in state["stateful_callbacks"].values():
        callback["attributes"].pop("output_dir", None)
    return state | {"best_model_checkpoint": Path(state["best_model_checkpoint"] or "").name}


def assert_equal_bit_for_bit(one: Trainer, other: Trainer) -> None:
    """Weights, config and optimizer state."""
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert one.model.config.to_dict() == other.model.config.to_dict()
    first, second = (trainer.optimizer.state_dict() for trainer in (one, other))
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for index, state in first["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["state"][index][key])), (index, key)


def on_two_processes(script, directory, env):
    """Run `script` under torchrun with a new directory in `directory` as its argument, and return that.

    Once more if a signal ended a process, with the crash among pytest's warnings: an interpreter with FSDP2 on gloo
    has been seen to crash once, in dozens of launches.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    env = env | {"PYTHONFAULTHANDLER": "1"}
    for attempt in ("first", "second"):
        output = directory / attempt
        output.mkdir()
        done = subprocess.run([*torchrun, str(output)], env=env, timeout=400, stderr=subprocess.PIPE, text=True)
        print(done.stderr, file=sys.stderr)
        if not re.search(r"exitcode: -\d", done.stderr):
            break
        warnings.warn(f"A process has crashed: {done.stderr[-5000:]}", stacklevel=2)
    done.check_returncode()
    return output
