"""Models whose layers may have different state sizes; importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .mimo_ssm import (
    LRU,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)
from .per_layer import layer_state_sizes, set_layer_state_size


AutoConfig.register(MimoSSMConfig.model_type, MimoSSMConfig, exist_ok=True)
AutoModel.register(MimoSSMConfig, MimoSSMModel, exist_ok=True)
AutoModelForCausalLM.register(MimoSSMConfig, MimoSSMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MimoSSMConfig, MimoSSMForSequenceClassification, exist_ok=True)


__all__ = [
    "LRU",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
    "layer_state_sizes",
    "set_layer_state_size",
]
