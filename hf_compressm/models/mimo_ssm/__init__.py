"""MIMO SSM: linear recurrent units with a complex diagonal state, in blocks."""

from .configuration_mimo_ssm import MimoSSMConfig
from .modeling_mimo_ssm import (
    LRU,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)

__all__ = [
    "LRU",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
]
