"""State sizes that differ from layer to layer, in the form that transformers reads and writes: `per_layer_config`."""

from transformers import PreTrainedConfig


def layer_state_sizes(config: PreTrainedConfig) -> list[int]:
    """The state size of each layer, equal or not."""
    return [layer.state_size for layer in config.per_layer_config]


def set_layer_state_size(config: PreTrainedConfig, layer_idx: int, n: int) -> None:
    """Set the state size of one layer in place and bring the config into its normal form.

    Normal form: `state_size` is the largest size, and `per_layer_config` names the layers that have less. With equal
    sizes that is a plain `state_size` and no `per_layer_config`. So the form depends on the sizes alone, not on the
    way that led to them.

    Args:
        config: a config whose only attribute per layer is `state_size`.
        layer_idx: the layer, from 0.
        n: its new state size.

    Raises:
        IndexError: the config has no such layer.
        ValueError: `n` is below 1.
    """
    sizes = layer_state_sizes(config)
    if not 0 <= layer_idx < len(sizes):
        raise IndexError(f"expected a layer index from 0 to {len(sizes) - 1}, found {layer_idx}")
    if n < 1:
        raise ValueError(f"expected a state size of at least 1 for layer {layer_idx}, found {n}")
    sizes[layer_idx] = n
    largest = max(sizes)
    config.per_layer_config = None
    config.state_size = largest
    smaller = {idx: {"state_size": size} for idx, size in enumerate(sizes) if size != largest}
    if smaller:
        config.per_layer_config = smaller
