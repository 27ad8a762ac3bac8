"""Mamba-2 with a state size per layer."""

from .configuration_reducible_mamba2 import ReducibleMamba2Config
from .modeling_reducible_mamba2 import (
    ReducibleMamba2ForCausalLM,
    ReducibleMamba2Mixer,
    ReducibleMamba2Model,
    ReducibleMamba2PreTrainedModel,
)

__all__ = [
    "ReducibleMamba2Config",
    "ReducibleMamba2ForCausalLM",
    "ReducibleMamba2Mixer",
    "ReducibleMamba2Model",
    "ReducibleMamba2PreTrainedModel",
]
