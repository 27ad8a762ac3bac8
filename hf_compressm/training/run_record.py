"""What a run was, for its report and its card: command, seed, hyperparameters, data, machine and speed."""

import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer, is_hf_dataset

_TIMED_STEPS = 100  # on either side of the reductions
_LOCAL_BUILDERS = ("csv", "generator", "json", "pandas", "parquet", "text")
_SECRET_OPTION = re.compile(r"--?[\w-]*(token|key|secret|password)", re.IGNORECASE)
_TOKEN = re.compile(r"hf_\w{20,}")
_MASK = "***"
_PACKAGES = ("hf-compressm", "transformers", "torch", "accelerate")


class RunRecord:
    """Fills the `run` of a report while a run goes on.

    Args:
        record: the dictionary to fill; what a checkpoint brought stays.
        events: the steps of the reductions, ascending.
    """

    def __init__(self, record: dict[str, Any], events: Sequence[int]):
        self.record = record
        self._events = events
        self._seconds: dict[str, list[float]] = {"before": [], "after": []}
        self._side: str | None = None
        self._started = 0.0

    def describe(self, args: TrainingArguments, model: nn.Module, trainer: Trainer | None) -> None:
        """Take down what is known at the start."""
        self.record |= {
            "command": _command(sys.argv),
            "seed": args.seed,
            "machine": _machine(args),
            "versions": {"python": platform.python_version()} | {p: v for p in _PACKAGES if (v := _version(p))},
        }
        self.record.setdefault("parameters", {"before": count_parameters(model)})
        self.record.pop("best", None)  # of the run that a checkpoint continues
        if trainer is not None:
            self.record["hyperparameters"] = _plain(extract_hyperparameters_from_trainer(trainer))
            self.record["card"] = _dataset(trainer) | self.record.get("card", {})

    def step_begins(self, step: int, observed: bool) -> None:
        """Start the clock if the step, the number of which is given, is one to be timed.

        Args:
            step: counted from 1.
            observed: the layers are observed in it, which takes time of its own.
        """
        self._side = "before" if step <= self._events[0] else "after" if step > self._events[-1] else None
        if observed or (self._side and len(self._seconds[self._side]) >= _TIMED_STEPS):
            self._side = None
        if self._side:
            self._started = _now()

    def step_ends(self) -> None:
        """Stop the clock."""
        if self._side:
            self._seconds[self._side].append(_now() - self._started)

    def count(self, model: nn.Module) -> None:
        """Count the parameters as they are now."""
        self.record["parameters"]["after"] = count_parameters(model)

    def end(self, args: TrainingArguments, state: TrainerState) -> None:
        """Take down which model `load_best_model_at_end` brought back, if it did; later evaluations are of it, too."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            step = int(state.best_model_checkpoint.rpartition("-")[2])  # `best_global_step` need not have been saved
            self.record["best"] = {"step": step, "log_entries": len(state.log_history)}

    def finish(self) -> None:
        """Bring the step times up to date."""
        times = {side: round(1e3 * median(taken), 3) for side, taken in self._seconds.items() if taken}
        self.record["step_ms"] = self.record.get("step_ms", {}) | times


def _command(words: list[str]) -> str:
    """A command line that may be published: values of options for tokens, keys and passwords are masked."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        after_secret = bool(shown) and _SECRET_OPTION.fullmatch(shown[-1]) and not word.startswith("--")
        if after_secret or _TOKEN.fullmatch(word):
            shown.append(_MASK)
        else:
            shown.append(f"{name}={_MASK}" if equals and _SECRET_OPTION.fullmatch(name) else word)
    return shlex.join(["python", *shown])


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def _machine(args: TrainingArguments) -> str:
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} {platform.machine()} cores, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    return f"{cores}, {device}{processes}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: v if isinstance(v, int | float | str | None) else str(v) for key, v in values.items()}


def _dataset(trainer: Trainer) -> dict[str, Any]:
    """Name and configuration of a dataset from the Hub, as the Trainer's own card tells them."""
    data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    name = getattr(data, "builder_name", None) if is_hf_dataset(data) else None
    if name is None or name in _LOCAL_BUILDERS:
        return {}
    return {"dataset_tags": name, "dataset_args": data.config_name}
