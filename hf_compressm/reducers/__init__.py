"""Weights <-> realizations, one file per architecture."""

from . import mamba, mamba2, mimo_ssm  # register their reducers
from .base import Reduction, StateReducer, find_reducible, register_reducer, supported_layers

__all__ = [
    "Reduction",
    "StateReducer",
    "find_reducible",
    "mamba",
    "mamba2",
    "mimo_ssm",
    "register_reducer",
    "supported_layers",
]
