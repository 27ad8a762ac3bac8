import pytest
import torch

from hf_compressm.models import (
    MimoSSMConfig,
    MimoSSMForCausalLM,
    MimoSSMForSequenceClassification,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaForCausalLM,
)

UNEQUAL = {0: {"state_size": 5}, 2: {"state_size": 3}}


@pytest.fixture
def make_config():
    def make(**options):
        defaults = {"vocab_size": 32, "hidden_size": 12, "state_size": 8, "num_hidden_layers": 3}
        return MimoSSMConfig(**(defaults | {"pad_token_id": 0, "eos_token_id": 2} | options))

    return make


@pytest.fixture
def make_lm(make_config):
    """A small language model whose logits depend visibly on its whole input; the layers have unequal sizes."""

    def make(**options):
        model = MimoSSMForCausalLM(make_config(**({"per_layer_config": UNEQUAL, "initializer_range": 0.5} | options)))
        return model.eval()

    return make


@pytest.fixture
def make_classifier(make_config):
    def make(**options):
        return MimoSSMForSequenceClassification(make_config(**({"initializer_range": 0.5} | options))).eval()

    return make


@pytest.fixture
def tokens():
    return torch.randint(3, 32, (3, 11))


REDUCIBLE = {
    "mamba": (ReducibleMambaForCausalLM, {}),
    "mamba2": (ReducibleMamba2ForCausalLM, {"num_heads": 4, "head_dim": 6, "n_groups": 2, "chunk_size": 4}),
}


@pytest.fixture
def make_reducible():
    """A small Mamba or Mamba-2 with unequal layers; random everywhere, biases included, so that all of it counts.

    "mamba2 with maps" has one layer with maps, one of another size, and one that is not reduced.
    """

    def make(family, **options):
        name = family.split()[0]
        model_class, sizes = REDUCIBLE[name]
        layers = UNEQUAL | ({0: {"state_size": 5, "conv_state_size": 7}} if family.endswith("maps") else {})
        defaults = {"vocab_size": 32, "hidden_size": 12, "state_size": 8, "num_hidden_layers": 3}
        defaults |= {"pad_token_id": 0, "eos_token_id": 2, "per_layer_config": layers}
        model = model_class(model_class.config_class(**(defaults | sizes | options)))
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.3 * torch.randn_like(param))
        return model.eval()

    return make
