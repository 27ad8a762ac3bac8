"""Weights <-> realizations, one file per architecture."""

from . import mamba, mamba2, mimo_ssm  # register their reducers
from .base import (
    Reduction,
    StateReducer,
    allow_other_sizes,
    find_reducible,
    register_reducer,
    supported_layers,
)
from .refused import refuse_layers

__all__ = [
    "Reduction",
    "StateReducer",
    "allow_other_sizes",
    "find_reducible",
    "mamba",
    "mamba2",
    "mimo_ssm",
    "refuse_layers",
    "register_reducer",
    "supported_layers",
]
