"""Checkpoints of the Trainer: whole or not, of this model or not, and what this package adds to them."""

import functools
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..reducers import find_reducible
from ..surgery import Ranks

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_BY_TORCH = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args)\.(pt|pth|bin)")
_NAMES_SHOWN = 3
_NOT_SAVED = ("all_tied_weights_keys", "_keys_to_ignore_on_save")  # by `save_pretrained`


def calibration_file(process: int | str) -> str:
    """Name of the file in a checkpoint that holds what one process has observed so far; "*" for all of them."""
    return f"compressm_calibration_{process}.safetensors"


def local_processes() -> int:
    """Processes of this run on this machine, whose files it must find in a checkpoint."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is named as the Trainer names its checkpoints."""
    return _CHECKPOINT.fullmatch(path.name) is not None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in an output directory, whole or not, the last one first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted(filter(is_checkpoint, found), key=lambda path: -int(_CHECKPOINT.fullmatch(path.name)[1]))


def callback_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of the callback; empty if it was written without one.

    Raises:
        OSError, ValueError, AttributeError: there is no readable `trainer_state.json`.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    callbacks = state.get("stateful_callbacks") or {}
    attributes = [saved.get("attributes", {}) for saved in callbacks.values() if isinstance(saved, dict)]
    return next((found for found in attributes if "calibrated" in found), {})


def find_damage(checkpoint: Path) -> str:
    """Why a run cannot be resumed from a checkpoint; empty if it is whole.

    The Trainer writes `trainer_state.json` last, so that a process killed while saving leaves none, or half of one.
    Beyond that, the Trainer's files and all safetensors must have the length that they tell, and the files of every
    process on this machine be there.
    """
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        state = callback_state(checkpoint)
    except (OSError, ValueError, AttributeError) as error:
        return f"no readable {TRAINER_STATE_NAME} ({type(error).__name__})"
    for file in sorted(checkpoint.iterdir()):
        if not file.is_file():
            continue
        if _BY_TORCH.fullmatch(file.name) and not zipfile.is_zipfile(file):
            return f"{file.name} is damaged"
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.name.endswith(".index.json"):
                shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
                if missing := sorted(shard for shard in shards if not (checkpoint / shard).is_file()):
                    return f"{missing[0]} is missing"
        except (OSError, KeyError, ValueError, SafetensorError):
            return f"{file.name} is damaged"
    return _missing_process(checkpoint, state)


def _missing_process(checkpoint: Path, state: dict[str, Any]) -> str:
    processes = state.get("processes", 1)
    expected = [calibration_file(i) for i in range(processes if state.get("calibrated") else 0)]
    if (checkpoint / "rng_state_0.pth").is_file():
        expected += [f"rng_state_{i}.pth" for i in range(processes)]
    return next((f"{name} is missing" for name in expected if not (checkpoint / name).is_file()), "")


def last_whole_checkpoint(output_dir: str | Path) -> Path:
    """The last checkpoint that a run can be resumed from; a warning names those that are stepped over.

    Raises:
        ValueError: there is none.
    """
    damaged = {}
    for checkpoint in checkpoints(output_dir):
        if not (damage := find_damage(checkpoint)):
            for other, why in damaged.items():
                logger.warning("Stepping over %s, which is incomplete: %s.", other.name, why)
            if damaged:
                logger.warning("Resuming from %s, the last whole checkpoint.", checkpoint)
            return checkpoint
        damaged[checkpoint] = damage
    found = "; ".join(f"{path.name}: {why}" for path, why in damaged.items()) or "none"
    raise ValueError(f"Expected a whole checkpoint to resume from in {output_dir}; found {found}. Start afresh.")


def check_checkpoint(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint that is not whole, or that another model wrote.

    Raises:
        ValueError: what was expected and what was found.
    """
    if damage := find_damage(checkpoint):
        whole = next((other for other in checkpoints(checkpoint.parent) if not find_damage(other)), "none")
        raise ValueError(f"{checkpoint} cannot be resumed from: {damage}. The last whole one beside it is {whole}.")
    _check_origin(checkpoint, model)


def check_sizes(checkpoint: Path, model: nn.Module) -> None:
    """Refuse weights of other sizes, for a model that is sharded before they are loaded.

    Raises:
        ValueError: what was expected and what was found.
    """
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            for name, value in model.state_dict().items():
                shape = tuple(weights.get_slice(name).get_shape()) if name in names else value.shape
                if shape != value.shape:
                    raise ValueError(
                        f"Expected {name} of shape {tuple(value.shape)} in {checkpoint}; found {shape}, which a "
                        "sharded model cannot take. Give the Trainer the model that `from_pretrained` makes of the "
                        "checkpoint."
                    )


def _check_origin(checkpoint: Path, model: nn.Module) -> None:
    names = _weight_names(checkpoint)
    if names is None:
        return  # sharded by an engine, or adapters alone
    added = {f"{name}.{key}" for name, (_, cls) in find_reducible(model).items() for key in cls.added_parameters}
    known = {name.removeprefix("_orig_mod.") for name in model.state_dict()}
    optional = added.union(*(getattr(model, keys, None) or () for keys in _NOT_SAVED))
    missing, unexpected = sorted(known - names - optional), sorted(names - known - optional)
    if missing or unexpected:
        found = _model_type(checkpoint)
        expected = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"{checkpoint} was written by another model: expected the weights of this one ({expected}); found those "
            f"of {found}, which has {_some(unexpected)} besides, and lacks {_some(missing)}. Resume with the model of "
            "the original run."
        )


def _weight_names(checkpoint: Path) -> set[str] | None:
    index, whole = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return None


def _model_type(checkpoint: Path) -> str:
    try:
        return json.loads((checkpoint / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"]
    except (OSError, KeyError, ValueError):
        return "no model type"


def _some(names: list[str]) -> str:
    return (", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")) or "nothing"


class Replacement:
    """A method of one object, replaced until `undo`.

    Args:
        owner: the object.
        name: of the method.
        make: the new one, given the old.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Callable], Callable]):
        self._owner, self._name = owner, name
        self._own = {key: value for key, value in vars(owner).items() if key == name}
        setattr(owner, name, make(getattr(owner, name)))

    def undo(self) -> None:
        """The method as it was: that of the class, or the object's own."""
        vars(self._owner).pop(self._name, None)
        vars(self._owner).update(self._own)


class ResumingTrain:
    """`Trainer.train`, which resumes from whole checkpoints of the same model only.

    With ``resume_from_checkpoint=True`` incomplete checkpoints are stepped over; one that is named must be whole.

    Args:
        trainer: whose `train` it takes the place of.
        at_end: called with the trainer wherever a run ends, also by an exception.

    Attributes:
        checkpoint: that the present call resumes from, if it does.
        reduced: whether sizes have changed since the call began.
    """

    def __init__(self, trainer: Trainer, at_end: Callable[[Trainer], None]):
        self._trainer, self._train, self._at_end = trainer, trainer.train, at_end
        self.checkpoint: Path | None = None
        self.reduced = False
        functools.update_wrapper(self, self._train)

    def __call__(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self.reduced = False
        self.checkpoint = None
        if resume_from_checkpoint:
            found, problem = on_main(lambda: self._choose(resume_from_checkpoint))
            if problem:
                raise ValueError(problem)
            self.checkpoint, resume_from_checkpoint = Path(found), found
        try:
            return self._train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._at_end(self._trainer)

    def _choose(self, wanted: str | bool) -> tuple[str, str]:
        """The checkpoint to resume from, or what is wrong with it."""
        try:
            found = last_whole_checkpoint(self._trainer.args.output_dir) if wanted is True else Path(wanted)
            check_checkpoint(found, self._trainer.model)
            if self._trainer.is_fsdp_enabled:
                check_sizes(found, self._trainer.model)
        except ValueError as error:
            return "", str(error)
        return str(found), ""


def on_main(compute: Callable[[], Any]) -> Any:
    """What `compute` returns on the first process, on every process."""
    return Ranks().decide(compute) if _together() else compute()


def all_ranks(condition: bool) -> bool:
    """Whether something holds on every process."""
    return all(Ranks().gather(condition)) if _together() else condition


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
