"""Configuration of Mamba-2 with a state size per layer."""

from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config

from ..per_layer import validate_per_layer_config
from ..stock import StockConfigMixin


@strict
class ReducibleMamba2Config(StockConfigMixin, Mamba2Config):
    r"""Configuration of a [`ReducibleMamba2Model`]: that of the stock model, and two sizes that layers may differ in.

    `per_layer_config={1: {"state_size": 16, "conv_state_size": 64}}` gives layer 1 other sizes. Read them as
    `config.per_layer_config[layer_idx].state_size`: with unequal ones there is no single `config.state_size`, and
    reading it is an error. `ReducibleMamba2Config.from_stock(config)` takes over a `Mamba2Config`.

    Args:
        conv_state_size (`int`, *optional*): Channels per group that the convolution has for B, and for C. None: as
            many as `state_size`, as in the stock model. A number: two linear maps after the convolution take B and C
            from these channels to the `state_size` of the scan.

    Example:

    ```python
    >>> from hf_compressm import ReducibleMamba2Config, ReducibleMamba2ForCausalLM

    >>> sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 2}
    >>> config = ReducibleMamba2Config(vocab_size=256, state_size=64, **sizes)
    >>> model = ReducibleMamba2ForCausalLM(config)

    ```
    """

    model_type = "reducible_mamba2"
    stock_model_type = Mamba2Config.model_type
    keys_to_ignore_at_inference = ["cache"]

    conv_state_size: int | None = None

    def validate_architecture(self) -> None:
        """Checks that one field's type cannot tell; runs after construction and before saving."""
        validate_per_layer_config(self, ("state_size", "conv_state_size"))
        super().validate_architecture()
        for layer_idx, layer in enumerate(self.per_layer_config):
            if layer.conv_state_size is not None and layer.conv_state_size < layer.state_size:
                raise ValueError(
                    f"expected conv_state_size of layer {layer_idx} to be None or at least its state_size "
                    f"({layer.state_size}), found {layer.conv_state_size}"
                )


__all__ = ["ReducibleMamba2Config"]
