"""Running averages of the weights, which would not follow a change of shape."""

import gc

from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages_of(model: nn.Module) -> str:
    """Why an unwrapped model must keep its shapes, if a living `AveragedModel` may follow it; else empty.

    It does not say which model it follows: any of the same class and with the same shapes is taken for one.
    """
    shapes = _shapes(model)
    for obj in gc.get_objects():
        if not issubclass(type(obj), AveragedModel):
            continue
        if any(type(m) is type(model) and _shapes(m) == shapes for m in obj.modules()):
            return (
                "a torch.optim.swa_utils.AveragedModel holds copies of weights with the present shapes, and could not "
                "be updated after a reduction. Make it after the last reduction, and delete this one"
            )
    return ""


def _shapes(model: nn.Module) -> list[tuple]:
    return [(name, tuple(param.shape)) for name, param in model.named_parameters()]
