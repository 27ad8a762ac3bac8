"""Models with a state size per layer; importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .mamba import ReducibleMambaConfig, ReducibleMambaForCausalLM, ReducibleMambaMixer, ReducibleMambaModel
from .mamba2 import ReducibleMamba2Config, ReducibleMamba2ForCausalLM, ReducibleMamba2Mixer, ReducibleMamba2Model
from .mimo_ssm import (
    LRU,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    MimoSSMModel,
    MimoSSMPreTrainedModel,
)
from .per_layer import layer_state_sizes, set_layer_state_size

for _config, _model, _causal_lm in (
    (MimoSSMConfig, MimoSSMModel, MimoSSMForCausalLM),
    (ReducibleMambaConfig, ReducibleMambaModel, ReducibleMambaForCausalLM),
    (ReducibleMamba2Config, ReducibleMamba2Model, ReducibleMamba2ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
AutoModelForSequenceClassification.register(MimoSSMConfig, MimoSSMForSequenceClassification, exist_ok=True)

__all__ = [
    "LRU",
    "MimoSSMConfig",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMPreTrainedModel",
    "ReducibleMamba2Config",
    "ReducibleMamba2ForCausalLM",
    "ReducibleMamba2Mixer",
    "ReducibleMamba2Model",
    "ReducibleMambaConfig",
    "ReducibleMambaForCausalLM",
    "ReducibleMambaMixer",
    "ReducibleMambaModel",
    "layer_state_sizes",
    "set_layer_state_size",
]
