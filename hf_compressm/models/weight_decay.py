"""The mark that keeps weight decay away from the parameters of a recurrence."""

from typing import Any

from torch import nn


class NoWeightDecayMixin:
    """For an `nn.Module`: the parameters named in `no_weight_decay` always have `_no_weight_decay = True`."""

    no_weight_decay: frozenset[str] = frozenset()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Loaders replace whole Parameters, so the mark is set wherever one arrives.
        if name in self.no_weight_decay and param is not None:
            param._no_weight_decay = True
        super().register_parameter(name, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies of a Parameter lose their attributes.
        super().__setstate__(state)
        for name in self.no_weight_decay:
            getattr(self, name)._no_weight_decay = True
