"""The part that knows the `Trainer`."""

from .callback import CompreSSMCallback

__all__ = ["CompreSSMCallback"]
