"""The whole model and its optimizer's state on disk, to go back to in place."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compression import Sizes
from ..surgery import reset_state, unwrap_optimizer

FOLDER = "_compressm_snapshots"
"""In the output directory. The Trainer uploads nothing whose name begins with an underscore."""

_MODEL, _OPTIMIZER, _GROUP = "model/", "optimizer/", "group/"
_SCHEDULED = {"params", "lr", "momentum", "betas", "weight_decay"}
"""Of an optimizer's groups: what schedules set, which go on, and the parameters, which have state of their own."""


@dataclass(frozen=True)
class Snapshot:
    """A model and its optimizer's state at one moment, on the CPU.

    Attributes:
        tensors: parameters and buffers as `model/NAME`, optimizer state as `optimizer/PARAMETER/KEY`, and that which
            the optimizer keeps in its groups as `group/NUMBER/KEY`.
        values: optimizer state that is no tensor, by the same names.
        on_cpu: names of optimizer state that was on the CPU beside a parameter that may not be.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    on_cpu: list[str]

    @classmethod
    def take(cls, model: nn.Module, optimizer: Optimizer | None) -> "Snapshot":
        """The present state; tensors share memory with it where they can."""
        persistent = model.state_dict().keys()
        own = [*model.named_parameters(), *model.named_buffers()]
        tensors = {f"{_MODEL}{name}": tensor for name, tensor in own if name in persistent}
        optimizer = unwrap_optimizer(optimizer)
        state = optimizer.state if optimizer is not None else {}
        entries = {
            f"{_OPTIMIZER}{name}/{key}": value
            for name, param in model.named_parameters()
            for key, value in state.get(param, {}).items()
        } | _group_entries(optimizer)
        tensors |= {name: value for name, value in entries.items() if torch.is_tensor(value)}
        return cls(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {name: value for name, value in entries.items() if name not in tensors},
            [name for name in entries if name in tensors and tensors[name].device.type == "cpu"],
        )

    def digest(self) -> str:
        """Of everything in it, to tell it from another and to find damage."""
        digest = hashlib.sha256(json.dumps([self.values, sorted(self.on_cpu)], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def put_back(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Bring an unwrapped model and its optimizer to this state; parameters stay the same objects."""
        sizes = Sizes(model)
        model.load_state_dict(_below(self.tensors, _MODEL), strict=False)  # tied weights are there once
        sizes.follow(model, optimizer)
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is None:
            return
        for name, param in model.named_parameters():
            prefix = f"{_OPTIMIZER}{name}/"
            state = _below(self.values, prefix)
            for key, tensor in _below(self.tensors, prefix).items():
                device = tensor.device if prefix + key in self.on_cpu else param.device
                state[key] = tensor.to(device, copy=True)
            reset_state(optimizer, [param])
            if state:
                optimizer.state[param] = state
        for number, group in enumerate(optimizer.param_groups):
            for key, value in _below(self.tensors | self.values, f"{_GROUP}{number}/").items():
                group[key] = _restored(group.get(key), value)


class SnapshotStore:
    """The snapshots of a run, one file for each step, in a folder of its output directory."""

    def __init__(self, output_dir: str | Path):
        self.folder = Path(output_dir) / FOLDER

    def write(self, step: int, snapshot: Snapshot) -> str:
        """Write a file, all of it or nothing; its digest is returned.

        Raises:
            OSError, SafetensorError: the disk is full, or may not be written to.
            TypeError: the optimizer keeps something else than tensors and numbers.
        """
        digest = snapshot.digest()
        metadata = {"values": json.dumps(snapshot.values), "on_cpu": json.dumps(snapshot.on_cpu)}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(
            snapshot.tensors, self._file(step), metadata
        )  # by a file beside it, which takes its place when whole
        return digest

    def read(self, step: int, digest: str) -> Snapshot:
        """What `write` wrote.

        Raises:
            ValueError: there is no such file, or it is damaged or another one.
        """
        path = self._file(step)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            snapshot = Snapshot(tensors, json.loads(metadata["values"]), json.loads(metadata["on_cpu"]))
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"expected a snapshot in {path}; found {type(error).__name__}: {error}") from error
        if snapshot.digest() != digest:
            raise ValueError(f"the snapshot in {path} is damaged or of another run")
        return snapshot

    def keep_only(self, steps: set[int]) -> None:
        """Delete the files of all other steps, and what an interrupted `write` left."""
        kept = {self._file(step) for step in steps}
        with suppress(OSError):  # too many files are no reason to end a run
            for path in {*self.folder.glob("step-*.safetensors"), *self.folder.glob(".tmp*")} - kept:
                path.unlink(missing_ok=True)
            self.folder.rmdir()  # if nothing is left in it

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step}.safetensors"


def _group_entries(optimizer: Optimizer | None) -> dict[str, Any]:
    """What some optimizers (Prodigy, schedule-free ones) keep beside their parameters: scalars of the whole group.

    Entries that a file cannot hold as they are, such as functions, are options, and stay as they are.
    """
    entries = {
        f"{_GROUP}{number}/{key}": value.item() if isinstance(value, np.generic) else value
        for number, group in enumerate(optimizer.param_groups if optimizer is not None else [])
        for key, value in group.items()
        if key not in _SCHEDULED
    }
    tensors = {name: value.clone() for name, value in entries.items() if torch.is_tensor(value)}  # groups share some
    return tensors | {name: value for name, value in entries.items() if name not in tensors and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether it comes back from JSON as it was, but for a tuple, of which `_restored` knows."""
    try:
        return json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value)
    except (TypeError, ValueError):
        return False


def _restored(present: Any, saved: Any) -> Any:
    """A saved entry of a group, of the type of the present one; a tensor stays the same object."""
    if torch.is_tensor(present) and torch.is_tensor(saved) and present.shape == saved.shape:
        return present.copy_(saved)
    if isinstance(present, np.generic):
        return type(present)(saved)
    return tuple(saved) if isinstance(present, tuple) else saved


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
