"""What the training steps before an event show: layers' inputs and whole batches; saved, so that a resume is exact."""

import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..observation import Loss, Observation, mean_loss

logger = logging.getLogger(__name__)

_BATCH, _LAYER = "batch/", "layer/"


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
        self._replaced: dict[str, Any] = {}
        self._started = False

    def start(self) -> None:
        """Begin to watch; once is enough."""
        if self._started:
            return
        self._started = True
        self.observation.start()
        if self._trainer is not None:
            compute_loss = self._trainer.compute_loss
            self._replaced = {k: v for k, v in vars(self._trainer).items() if k == "compute_loss"}

            def recording(model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
                if model.training:
                    self._batches.append(dict(inputs))  # compute_loss may take the labels out
                return compute_loss(model, inputs, *args, **kwargs)

            self._trainer.compute_loss = recording

    def stop(self) -> None:
        """Watch no longer."""
        self.observation.stop()
        if self._started and self._trainer is not None:
            del self._trainer.compute_loss  # the method of its class is seen again
            vars(self._trainer).update(self._replaced)
        self._started = False

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

    def save(self, args: TrainingArguments, checkpoint: Path) -> None:
        """Write what was seen so far beside the other files of a checkpoint, each process its own."""
        tensors = {f"{_LAYER}{name}": tensor for name, tensor in self.observation.statistics().items()}
        for index, batch in enumerate(self._batches):
            tensors.update({f"{_BATCH}{index}/{key}": v for key, v in batch.items() if torch.is_tensor(v)})
        if self._started and tensors:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(tensors, checkpoint / _file_name(args))

    def resume(self, args: TrainingArguments, state: TrainerState, output_dirs: list[str]) -> None:
        """Take over what the checkpoint that the run resumes from had seen of the present window.

        Args:
            args, state: of the Trainer.
            output_dirs: where that checkpoint may be.
        """
        directories = [Path(d) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" for d in output_dirs]
        file = next((d / _file_name(args) for d in directories if (d / _file_name(args)).is_file()), None)
        if file is None:
            if state.global_step > 0 and (self.observation.needed or self._trainer is not None):
                logger.warning(
                    "No calibration sums (%s) were found in %s: the next reduction sees only batches from here on.",
                    _file_name(args),
                    " or ".join(map(str, directories)),
                )
            return
        tensors = load_file(file, device=str(args.device))
        self.observation.load_statistics(_below(tensors, _LAYER))
        indices = sorted({int(name.split("/")[1]) for name in tensors if name.startswith(_BATCH)})
        for index in indices:
            self._batches.append(_below(tensors, f"{_BATCH}{index}/"))


def _file_name(args: TrainingArguments) -> str:
    return f"compressm_calibration_{args.process_index}.safetensors"


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
