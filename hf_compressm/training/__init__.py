"""The part that knows the `Trainer`."""

from .callback import CompreSSMCallback
from .offline import reduce_checkpoint

__all__ = ["CompreSSMCallback", "reduce_checkpoint"]
