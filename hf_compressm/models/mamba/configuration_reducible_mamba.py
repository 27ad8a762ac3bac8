"""Configuration of Mamba with a state size per layer."""

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig

from ..per_layer import validate_per_layer_config
from ..stock import StockConfigMixin


@strict
class ReducibleMambaConfig(StockConfigMixin, MambaConfig):
    r"""Configuration of a [`ReducibleMambaModel`]: that of the stock model, and layers may differ in `state_size`.

    `per_layer_config={1: {"state_size": 4}}` gives layer 1 another state size. Read the sizes as
    `config.per_layer_config[layer_idx].state_size`: with unequal ones there is no single `config.state_size`, and
    reading it is an error. `ReducibleMambaConfig.from_stock(config)` takes over a `MambaConfig`.

    Example:

    ```python
    >>> from hf_compressm import ReducibleMambaConfig, ReducibleMambaForCausalLM

    >>> config = ReducibleMambaConfig(vocab_size=256, hidden_size=64, state_size=32, num_hidden_layers=2)
    >>> model = ReducibleMambaForCausalLM(config)

    ```
    """

    model_type = "reducible_mamba"
    stock_model_type = MambaConfig.model_type
    keys_to_ignore_at_inference = ["cache"]

    def validate_architecture(self) -> None:
        """Checks that one field's type cannot tell; runs after construction and before saving."""
        validate_per_layer_config(self)


__all__ = ["ReducibleMambaConfig"]
