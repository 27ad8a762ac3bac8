"""Weights <-> realizations, one file per architecture."""

from . import mimo_ssm  # registers its reducer
from .base import Reduction, StateReducer, find_reducible, register_reducer, supported_layers

__all__ = ["Reduction", "StateReducer", "find_reducible", "mimo_ssm", "register_reducer", "supported_layers"]
