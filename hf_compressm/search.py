"""The largest reduction that the loss tolerates."""

from collections.abc import Callable
from math import isfinite

_SMALLEST_ERROR, _ITERATIONS = 1e-12, 12


def largest_reduction(
    sizes_for: Callable[[float], dict[str, int]],
    loss_increase: Callable[[dict[str, int]], float],
    max_increase: float,
) -> tuple[dict[str, int], float]:
    """Bisect, on a logarithmic scale, over one relative error that all layers share.

    Args:
        sizes_for: state sizes of the layers at a relative error between 0 and 1; larger errors give smaller sizes.
        loss_increase: measured increase of the loss at these sizes, anything if it is not finite.
        max_increase: what is tolerated.

    Returns:
        The sizes at the largest error found whose increase is tolerated, and that increase.
    """
    low, high = _SMALLEST_ERROR, 1.0
    best, best_increase = {}, 0.0
    measured: dict[tuple, float] = {}
    for _ in range(_ITERATIONS):
        error = (low * high) ** 0.5
        sizes = sizes_for(error)
        key = tuple(sizes.values())
        if key not in measured:
            measured[key] = loss_increase(sizes)
        if isfinite(measured[key]) and measured[key] <= max_increase:
            low, best, best_increase = error, sizes, measured[key]
        else:
            high = error
    return best, best_increase
