"""What the scans share: the dtype of their state, checks of their arguments, frozen steps."""

import torch


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others, whatever autocast says."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_arguments(
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]], mask: torch.Tensor | None, chunk_size: int
) -> None:
    """Raise ValueError unless each named tensor is None or of its shape, the mask boolean and the chunk not empty."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} of shape {shape}, found {tuple(tensor.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of dtype torch.bool, found {mask.dtype}; convert it with mask.bool()")
    if chunk_size < 1:
        raise ValueError(f"expected chunk_size >= 1, found {chunk_size}")


def zero_where_masked(mask: torch.Tensor | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`tensors (batch, L, …)` with zeros where `mask (batch, L)` is False.

    A step of size zero leaves the state of a selective recurrence exactly as it is, so no scan needs to see the mask.
    """
    if mask is None:
        return list(tensors)
    hidden = mask.logical_not()
    return [x.masked_fill(hidden.reshape(hidden.shape + (1,) * (x.dim() - 2)), 0) for x in tensors]
