"""Mamba with a state size per layer."""

from .configuration_reducible_mamba import ReducibleMambaConfig
from .modeling_reducible_mamba import (
    ReducibleMambaForCausalLM,
    ReducibleMambaMixer,
    ReducibleMambaModel,
    ReducibleMambaPreTrainedModel,
)

__all__ = [
    "ReducibleMambaConfig",
    "ReducibleMambaForCausalLM",
    "ReducibleMambaMixer",
    "ReducibleMambaModel",
    "ReducibleMambaPreTrainedModel",
]
