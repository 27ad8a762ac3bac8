"""Change the shape of a parameter in place, so that everything that refers to it goes on referring to it."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .preconditions import UnsupportedSetupError


@torch.no_grad()
def resize_parameter_(param: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Give `param` the values and the shape of `data`; the `Parameter` object stays the same one.

    Optimizers, tied modules, hooks and attributes (`_no_weight_decay`, ...) hang on the identity of the object. The
    detour through another dtype is what makes autograd drop the gradient accumulator that it caches with the old
    shape: a plain `param.data = data` fails on the next backward pass when a graph is still alive.

    Args:
        param: the parameter, of any shape; its gradient is dropped.
        data: the new values, of any shape; cast to the dtype and the device of `param` and copied.

    Raises:
        UnsupportedSetupError: the parameter is sharded.

    Returns:
        `param`.
    """
    if isinstance(param.data, DTensor):
        raise UnsupportedSetupError(
            f"Expected weights of shape {tuple(param.shape)}; found {tuple(data.shape)}. Weights of other state sizes "
            "cannot be loaded into a sharded model: make it from the config beside them "
            "(`from_pretrained(checkpoint)`) before it is sharded."
        )
    new = data.detach().to(device=param.device, dtype=param.dtype).clone(memory_format=torch.contiguous_format)
    param.grad = None
    other = torch.float64 if param.dtype == torch.float32 else torch.float32
    param.data = torch.empty(0, dtype=other, device=param.device)
    param.data = new
    return param
