"""Configuration of the MIMO SSM: a stack of linear recurrent units with a complex diagonal state."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..per_layer import validate_per_layer_config


@strict
class MimoSSMConfig(PreTrainedConfig):
    r"""Configuration of a [`MimoSSMModel`].

    Layers may have different state sizes: `per_layer_config={1: {"state_size": 24}}` gives layer 1 another one. They
    are read as `config.per_layer_config[layer_idx].state_size`, which works for equal sizes too.

    Args:
        vocab_size (`int`, *optional*): Number of tokens. None: the model has no embedding and takes no `input_ids`.
        input_size (`int`, *optional*): Channels of real-valued `input_values`. None: the model takes none. At least
            one of `vocab_size` and `input_size` is needed.
        hidden_size (`int`, defaults to 128): Width of the residual stream, input and output size of each recurrence.
        state_size (`int`, defaults to 256): Number of complex states of each recurrence.
        num_hidden_layers (`int`, defaults to 4): Number of blocks.
        r_min, r_max (`float`, default to 0.0 and 1.0): Eigenvalues start uniformly on the ring between these radii.
        max_phase (`float`, defaults to 2 pi): The phases of the eigenvalues start uniformly in `[0, max_phase]`.
        hidden_dropout (`float`, defaults to 0.0): Dropout after the activation and after the gate of each block.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        pooling (`"mean"` or `"last"`, defaults to `"mean"`): How [`MimoSSMForSequenceClassification`] sums up the
            sequence; only real tokens count.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights outside the
            recurrences.
        use_cache (`bool`, defaults to `True`): Whether to return the recurrent state when not training.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the output head shares the embedding's weights.

    Example:

    ```python
    >>> from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM

    >>> config = MimoSSMConfig(vocab_size=256, hidden_size=64, state_size=32, num_hidden_layers=2)
    >>> model = MimoSSMForCausalLM(config)

    ```
    """

    model_type = "mimo_ssm"
    keys_to_ignore_at_inference = ["cache"]

    vocab_size: int | None = None
    input_size: int | None = None
    hidden_size: int = 128
    state_size: int = 256
    num_hidden_layers: int = 4
    r_min: float | int = 0.0
    r_max: float | int = 1.0
    max_phase: float | int = 2 * math.pi
    hidden_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    pooling: Literal["mean", "last"] = "mean"
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps between calls, as transformers' caches name it: a recurrent state."""
        return ["linear_attention"] * self.num_hidden_layers

    def validate_architecture(self) -> None:
        """Checks that one field's type cannot tell; runs after construction and before saving."""
        validate_per_layer_config(self)
        if self.vocab_size is None and self.input_size is None:
            raise ValueError(
                "expected `vocab_size` (for input_ids), `input_size` (for input_values) or both, found neither"
            )
        sizes = {
            name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size", "input_size")
        }
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or size < 1):
                raise ValueError(f"expected {name} to be an integer of at least 1, found {size}")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"expected 0 <= r_min < r_max <= 1, found r_min={self.r_min}, r_max={self.r_max}")
        if not 0 <= self.max_phase <= 2 * math.pi:
            raise ValueError(f"expected 0 <= max_phase <= 2 pi, found {self.max_phase}")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"expected 0 <= hidden_dropout < 1, found {self.hidden_dropout}")


__all__ = ["MimoSSMConfig"]
