"""Calibration: layers' inputs, seen by hooks in forward passes that happen anyway, and the loss on a few batches."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .reducers import StateReducer
from .surgery import Ranks

Loss = Callable[[], float]
"""Mean loss of the model, as its weights are now, on the calibration batches."""


class Observation:
    """Hands the inputs of every layer that needs it to its reducer, from `start` to `stop`.

    Args:
        reducers: of all reducible layers, by name.
        training_only: ignore forward passes in evaluation mode, which happen between training steps.
    """

    def __init__(self, reducers: Mapping[str, StateReducer], training_only: bool):
        self.reducers = reducers
        self._observing = {name: reducer for name, reducer in reducers.items() if reducer.needs_observation}
        self.training_only = training_only
        self._handles: list[RemovableHandle] = []

    @property
    def needed(self) -> bool:
        """Whether any layer needs to be observed."""
        return bool(self._observing)

    def start(self) -> None:
        """Attach the hooks."""
        for reducer in self._observing.values():
            self._handles.append(reducer.module.register_forward_pre_hook(self._hook(reducer), with_kwargs=True))
        if self._handles:
            torch._dynamo.reset()  # compiled code does not look for new hooks

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            torch._dynamo.reset()
        self._handles = []

    def _hook(self, reducer: StateReducer):
        @torch._dynamo.disable
        @torch.no_grad()
        def observe(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            # activation checkpointing runs the layer again inside the backward pass: that is the same data
            recomputed = torch._C._current_graph_task_id() != -1
            if not recomputed and (module.training or not self.training_only):
                reducer.observe(args, kwargs)

        return observe

    def reduce_over_ranks(self, ranks: Ranks) -> None:
        """Put together what data-parallel ranks observed."""
        for reducer in self._observing.values():
            reducer.reduce_over_ranks(ranks)

    def statistics(self) -> dict[str, Tensor]:
        """What was observed so far, for a checkpoint."""
        return {f"{name}/{key}": t for name, r in self._observing.items() for key, t in r.statistics().items()}

    def load_statistics(self, *processes: Mapping[str, Tensor]) -> None:
        """Go on from what `statistics` returned, on one process or on several."""
        for name, reducer in self._observing.items():
            reducer.load_statistics(*(_of(name, seen) for seen in processes))

    def load_counts(self, statistics: Mapping[str, Tensor]) -> None:
        """Go on from where the process stood that returned these `statistics`, without what it had observed."""
        for name, reducer in self._observing.items():
            reducer.load_counts(_of(name, statistics))


def _of(layer: str, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{layer}/"
    return {key.removeprefix(prefix): t for key, t in statistics.items() if key.startswith(prefix)}


def first_batches(dataloader: Iterable, count: int, device: torch.device) -> list[dict[str, Any]]:
    """The first batches of a data loader, on a device.

    Raises:
        ValueError: there are none, or they are not dictionaries of model inputs.
    """
    batches = list(islice(dataloader, count))
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        found = type(batches[0]).__name__ if batches else "no batch"
        raise ValueError(f"Expected calibration batches that are dictionaries of model inputs; found {found}.")
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]


def model_loss(model: nn.Module, batches: list[dict[str, Any]]) -> Loss:
    """The loss that the model itself returns for batches with labels."""

    def loss(batch: dict[str, Any]) -> float:
        output = model(**batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise ValueError(f"Expected the model to return a loss; found none for the inputs {sorted(batch)}.")
        return float(value)

    return mean_loss(model, loss, batches)


def mean_loss(model: nn.Module, loss: Callable[[dict[str, Any]], float], batches: list[dict[str, Any]]) -> Loss:
    """The mean over batches, measured in evaluation mode: no dropout, and no random number drawn."""

    def measure() -> float:
        with evaluation_mode(model), torch.no_grad():
            return sum(loss(batch) for batch in batches) / len(batches)

    return measure


@contextmanager
def evaluation_mode(model: nn.Module):
    """Evaluation mode for a while, and the former mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
