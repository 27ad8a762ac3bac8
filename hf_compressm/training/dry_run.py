"""The table of a dry run: what each of several tolerances would do at an event of a real run."""

from typing import Any

from torch import nn

from ..analysis import Analysis, analyze_observed
from ..config import CompressionConfig
from ..observation import Observation


class DryRun:
    """Keeps the inputs of the forward pass before an event, and analyzes the model on them."""

    def __init__(self):
        self._batch: dict[str, Any] | None = None
        self._handle = None

    def watch(self, model: nn.Module) -> None:
        """Keep the inputs of the forward passes to come."""

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not args:
                self._batch = dict(kwargs)

        self._handle = model.register_forward_pre_hook(keep, with_kwargs=True)

    def stop(self) -> None:
        """Keep no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def analyze(self, model: nn.Module, config: CompressionConfig, observation: Observation) -> Analysis:
        """What tolerances would do; `observation` is of this event, and stopped."""
        self.stop()
        batch, self._batch = self._batch, None
        return analyze_observed(model, config, observation, batch)
