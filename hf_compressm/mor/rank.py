"""Rank rules: how many states each layer keeps, given the Hankel singular values of all layers.

A rule is a callable object, `rule(spectra) -> sizes`. It answers a layer's own size where nothing is to be gained, and
for a layer whose spectrum it cannot read (all zero or not finite). The energy rule is that of Chahine et al.,
CompreSSM (ICLR 2026, arXiv 2510.02823).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGETS = ("layer", "global")
ROUNDING = 1e-9
"""Slack for products of sizes and fractions, so that 30 % of 10 is 3 and not the next integer."""


def _identity(order: int) -> int:
    return order


@dataclass(frozen=True)
class Spectrum:
    """What a rule sees of one layer.

    Attributes:
        hsv: Hankel singular values, descending, 1-D.
        state_size: the layer's present number of states.
        states: number of states that a truncation to `order` directions costs. A real-balanced LRU has two directions
            per state and asks its realization; elsewhere a direction is a state.
    """

    hsv: Tensor
    state_size: int
    states: Callable[[int], int] = _identity

    def __post_init__(self):
        object.__setattr__(self, "hsv", self.hsv.detach().cpu().double())

    @property
    def readable(self) -> bool:
        return bool(self.hsv.isfinite().all()) and float(self.hsv.sum()) > 0

    @property
    def relative(self) -> Tensor:
        """The singular values divided by their sum."""
        return self.hsv / self.hsv.sum()

    def per_state(self) -> Tensor:
        """Share of each state in the sum: directions taken together where a state holds several, (state_size,)."""
        directions = max(1, math.ceil(len(self.hsv) / self.state_size))
        padded = self.hsv.new_zeros(self.state_size * directions)
        padded[: len(self.hsv)] = self.relative
        return padded.view(self.state_size, directions).sum(1)

    def size_for(self, order: int) -> int:
        """States to keep for `order` directions, between 1 and the present size."""
        order = max(1, order)
        return self.state_size if order >= len(self.hsv) else min(max(1, self.states(order)), self.state_size)


class RankRule(ABC):
    """Chooses the number of states to keep in each layer, 1 to `state_size`."""

    @abstractmethod
    def __call__(self, spectra: list[Spectrum]) -> list[int]: ...


class EnergyTolerance(RankRule):
    """The smallest order `r` with `sum_{i<=r} hsv_i >= (1 - tolerance) sum_i hsv_i`.

    With `budget="global"` each layer's values are divided by their own sum and pooled; the smallest of all layers go,
    as long as what is discarded sums to at most `tolerance` of the whole.
    """

    def __init__(self, tolerance: float, budget: str = "layer"):
        self.tolerance = _fraction("tolerance", tolerance)
        self.budget = _budget(budget)

    def __call__(self, spectra: list[Spectrum]) -> list[int]:
        sizes = [spectrum.state_size for spectrum in spectra]
        readable = [i for i, spectrum in enumerate(spectra) if spectrum.readable]
        for group in [readable] if self.budget == "global" and readable else [[i] for i in readable]:
            for i, order in zip(group, self._orders([spectra[i] for i in group]), strict=True):
                sizes[i] = spectra[i].size_for(order)
        return sizes

    def _orders(self, group: list[Spectrum]) -> list[int]:
        """Order of each layer once the smallest values of the group that together fit the tolerance are discarded."""
        pooled = torch.cat([spectrum.relative for spectrum in group])
        layer = torch.cat([torch.full((len(spectrum.hsv),), i) for i, spectrum in enumerate(group)])
        ascending = pooled.argsort(stable=True)
        discarded = int((pooled[ascending].cumsum(0) <= self.tolerance * len(group)).sum())
        return torch.bincount(layer[ascending[discarded:]], minlength=len(group)).tolist()


class ReductionFraction(RankRule):
    """Removes `fraction` of the present states: keeps `ceil((1 - fraction) n)`.

    With `budget="global"` the same number of states in total is kept where the relative singular values are largest.
    """

    def __init__(self, fraction: float, budget: str = "layer"):
        self.fraction = _fraction("reduction_fraction", fraction)
        self.budget = _budget(budget)

    def __call__(self, spectra: list[Spectrum]) -> list[int]:
        if self.budget == "layer":
            return [
                self._keep(spectrum.state_size) if spectrum.readable else spectrum.state_size for spectrum in spectra
            ]
        return _share_out(sum(self._keep(each.state_size) for each in spectra if each.readable), spectra)

    def _keep(self, size: int) -> int:
        return max(1, math.ceil((1 - self.fraction) * size - ROUNDING))


class TargetStateSize(RankRule):
    """Goes to `target` states per layer geometrically, `n (target/n)^(1/remaining_events)`, exactly at the last event.

    With `budget="global"` the target holds on average: `target` times the number of layers in total.
    """

    def __init__(self, target: int, remaining_events: int = 1, budget: str = "layer"):
        if target < 1 or remaining_events < 1:
            raise ValueError(
                "Expected target_state_size and remaining_events to be at least 1; "
                f"found {target} and {remaining_events}."
            )
        self.target, self.remaining_events, self.budget = target, remaining_events, _budget(budget)

    def __call__(self, spectra: list[Spectrum]) -> list[int]:
        readable = [each.state_size for each in spectra if each.readable]
        if self.budget == "global":
            return _share_out(self._step(sum(readable), self.target * len(readable)), spectra)
        return [self._step(each.state_size, self.target) if each.readable else each.state_size for each in spectra]

    def _step(self, size: int, target: int) -> int:
        if size <= target:
            return size
        return max(target, round(size * (target / size) ** (1 / self.remaining_events)))


class RelativeError(RankRule):
    """The smallest order ``r`` with ``sum_{i>r} hsv_i^2 <= error sum_i hsv_i^2`` in each layer.

    One number for all layers, along which a search for the largest tolerable reduction goes.
    """

    def __init__(self, error: float):
        self.error = error

    def __call__(self, spectra: list[Spectrum]) -> list[int]:
        return [self._size(spectrum) if spectrum.readable else spectrum.state_size for spectrum in spectra]

    def _size(self, spectrum: Spectrum) -> int:
        squares = spectrum.relative.square()
        discarded = squares.flip(0).cumsum(0)  # by 1, 2, ... of the smallest values
        return spectrum.size_for(len(squares) - int((discarded <= self.error * squares.sum()).sum()))


RANK_RULES: dict[str, type[RankRule]] = {
    "tolerance": EnergyTolerance,
    "reduction_fraction": ReductionFraction,
    "target_state_size": TargetStateSize,
}
"""The rule behind each field of the configuration that chooses one."""


def apply_constraints(
    sizes: list[int],
    spectra: list[Spectrum],
    *,
    min_state_size: int = 1,
    multiple_of: int = 1,
    min_reduction: float = 0.05,
    uniform: bool = False,
) -> list[int]:
    """Make a rule's answer fit for use; never above the present sizes.

    Args:
        sizes: what the rule answered.
        spectra: what the rule was asked about, for the present sizes.
        min_state_size: no layer goes below it.
        multiple_of: sizes are rounded upward to a multiple of it.
        min_reduction: a layer whose new size is above `(1 - min_reduction)` of its present one keeps that.
        uniform: all layers take the largest of the new sizes.
    """
    present = [spectrum.state_size for spectrum in spectra]
    rounded = [math.ceil(max(size, min_state_size) / multiple_of) * multiple_of for size in sizes]
    if uniform and rounded:
        rounded = [max(rounded)] * len(rounded)
    return [
        old if new > (1 - min_reduction) * old + ROUNDING else new for new, old in zip(rounded, present, strict=True)
    ]


def _share_out(total: int, spectra: list[Spectrum]) -> list[int]:
    """Sizes that sum to `total` over the readable layers, each at least 1, where the shares per state are largest."""
    readable = [i for i, spectrum in enumerate(spectra) if spectrum.readable]
    sizes = [1 if spectrum.readable else spectrum.state_size for spectrum in spectra]
    rest = [(share, i) for i in readable for share in spectra[i].per_state()[1:].tolist()]
    rest.sort(key=lambda entry: entry[0], reverse=True)
    for _, i in rest[: max(0, total - len(readable))]:
        sizes[i] += 1
    return sizes


def _fraction(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"Expected {name} between 0 and 1, both excluded; found {value}.")
    return value


def _budget(value: str) -> str:
    if value not in BUDGETS:
        raise ValueError(f"Expected budget to be one of {', '.join(BUDGETS)}; found {value!r}.")
    return value
