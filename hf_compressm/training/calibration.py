"""What the training steps before an event show: layers' inputs and whole batches; saved, so that a resume is exact."""

import logging
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from ..observation import Loss, Observation, mean_loss
from .checkpoint import Replacement, calibration_file

logger = logging.getLogger(__name__)

_BATCH, _LAYER, _PROCESSES = "batch/", "layer/", "processes"


class Calibration:
    """The observation of one event, and the training batches that its loss is measured on.

    Args:
        observation: of the layers; not started.
        trainer: whose batches to keep and whose `compute_loss` (label smoothing, custom loss functions) to measure
            with; None if no loss is needed.
        count: number of micro-batches to keep.
    """

    def __init__(self, observation: Observation, trainer: Trainer | None, count: int):
        self.observation = observation
        self._trainer = trainer
        self._batches: deque[dict[str, Any]] = deque(maxlen=count)
        self._recording: Replacement | None = None
        self._started = False

    def start(self) -> None:
        """Begin to watch; once is enough."""
        if self._started:
            return
        self._started = True
        self.observation.start()
        if self._trainer is not None:
            self._recording = Replacement(self._trainer, "compute_loss", self._record)

    def stop(self) -> None:
        """Watch no longer."""
        self.observation.stop()
        if self._recording is not None:
            self._recording.undo()
        self._recording, self._started = None, False

    def _record(self, compute_loss: Callable) -> Callable:
        def recording(model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
            if model.training:
                self._batches.append(dict(inputs))  # compute_loss may take the labels out
            return compute_loss(model, inputs, *args, **kwargs)

        return recording

    def loss(self, model: nn.Module) -> Loss | None:
        """The loss to measure, if one is needed."""
        if self._trainer is None:
            return None
        if not self._batches:
            logger.warning(
                "No training batch went through `Trainer.compute_loss`, so that no loss can be measured and nothing "
                "is reduced. Does a subclass override `training_step`?"
            )
            return lambda: math.nan
        return mean_loss(
            model, lambda batch: float(self._trainer.compute_loss(model, dict(batch))), list(self._batches)
        )

    def save(self, args: TrainingArguments, checkpoint: Path) -> bool:
        """Write what was seen so far beside the other files of a checkpoint, each process its own.

        Returns:
            Whether there was anything to write.
        """
        tensors = {f"{_LAYER}{name}": tensor for name, tensor in self.observation.statistics().items()}
        for index, batch in enumerate(self._batches):
            tensors.update({f"{_BATCH}{index}/{key}": v for key, v in batch.items() if torch.is_tensor(v)})
        for process, file in _files(checkpoint).items():  # of an earlier run, which may have had more processes
            if process % args.world_size == args.process_index:
                file.unlink(missing_ok=True)
        if not (self._started and tensors):
            return False
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, checkpoint / calibration_file(args.process_index), {_PROCESSES: str(args.world_size)})
        return True

    def resume(self, args: TrainingArguments, checkpoints: list[Path]) -> None:
        """Take over what the checkpoint that the run resumes from had seen of the present window.

        Where it was written by more processes than there are now, each goes on for several of them: sums add up. One
        that takes the place of none goes on counting where the others stood.

        Args:
            args: of the Trainer.
            checkpoints: where that checkpoint may be; none for a run that begins.
        """
        files = next(filter(None, map(_files, checkpoints)), {})
        written = _processes(files) if files else args.world_size
        former = range(args.process_index, written, args.world_size)
        missing = [calibration_file(process) for process in former if process not in files]
        if missing and checkpoints and (self.observation.needed or self._trainer is not None):
            logger.warning(
                "No calibration sums (%s) were found in %s: the next reduction goes without what they hold.",
                ", ".join(missing),
                " or ".join(map(str, checkpoints)),
            )
        seen = [load_file(files[process], str(args.device)) for process in former if process in files]
        if seen:
            self.observation.load_statistics(*(_below(tensors, _LAYER) for tensors in seen))
        elif files:
            self.observation.load_counts(_below(load_file(next(iter(files.values()))), _LAYER))
        places = {
            (int(name.split("/")[1]), n) for n, found in enumerate(seen) for name in found if name.startswith(_BATCH)
        }
        for index, process in sorted(places):  # the last of all of them are kept
            self._batches.append(_below(seen[process], f"{_BATCH}{index}/"))


def _files(checkpoint: Path) -> dict[int, Path]:
    """What the processes that wrote a checkpoint have seen, by their numbers."""
    found = {path.stem.rpartition("_")[2]: path for path in sorted(checkpoint.glob(calibration_file("*")))}
    return {int(process): path for process, path in found.items() if process.isdecimal()}


def _processes(files: dict[int, Path]) -> int:
    """How many processes there were when the files were written, which all of them say."""
    with safe_open(next(iter(files.values())), framework="pt") as opened:
        return int((opened.metadata() or {}).get(_PROCESSES, len(files)))


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
