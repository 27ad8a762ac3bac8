"""State sizes that differ from layer to layer, in the form that transformers reads and writes: `per_layer_config`."""

from typing import Any

from transformers import PreTrainedConfig


def layer_state_sizes(config: PreTrainedConfig) -> list[int]:
    """The state size of each layer, equal or not."""
    return [layer.state_size for layer in config.per_layer_config]


def set_layer_state_size(config: PreTrainedConfig, layer_idx: int, n: int, **others: Any) -> None:
    """Set the state size of one layer in place and bring the config into its normal form.

    Normal form: what all layers have in common is a plain attribute, without `per_layer_config`. Where layers differ,
    `state_size` is the largest size and any other attribute None, and `per_layer_config` names the layers that differ
    from that. So the form depends on the values alone, not on the way that led to them.

    Args:
        config: a config of this package.
        layer_idx: the layer, from 0.
        n: its new state size.
        others: new values of other attributes of the layer, such as `conv_state_size`.

    Raises:
        IndexError: the config has no such layer.
        ValueError: `n` is below 1.
    """
    layers = config.num_hidden_layers
    if not 0 <= layer_idx < layers:
        raise IndexError(f"expected a layer index from 0 to {layers - 1}, found {layer_idx}")
    if n < 1:
        raise ValueError(f"expected a state size of at least 1 for layer {layer_idx}, found {n}")
    names = {"state_size", *others} | (config.per_layer_attributes or set())
    values = {name: [getattr(layer, name) for layer in config.per_layer_config] for name in names}
    for name, value in (others | {"state_size": n}).items():
        values[name][layer_idx] = value
    config.per_layer_config = None
    differing = [{} for _ in range(layers)]
    for name in sorted(names):
        column = values[name]
        if all(value == column[0] for value in column):
            common = column[0]
        else:
            common = max(column) if name == "state_size" else None
        setattr(config, name, common)
        for layer, value in zip(differing, column, strict=True):
            if value != common:
                layer[name] = value
    if any(differing):
        config.per_layer_config = {idx: layer for idx, layer in enumerate(differing) if layer}


def validate_per_layer_config(config: PreTrainedConfig, attributes: tuple[str, ...] = ("state_size",)) -> None:
    """Raise a ValueError unless layers differ in `attributes` alone and every state size is at least 1."""
    unknown = (config.per_layer_attributes or set()) - set(attributes)
    skips = config.is_heterogeneous and any(layer.skip for layer in config.per_layer_config)
    if unknown or skips:
        allowed = " and ".join(f"`{name}`" for name in attributes)
        raise ValueError(
            f"expected `per_layer_config` to set nothing but {allowed}, found {sorted(unknown) or ['skip']}"
        )
    for layer_idx, n in enumerate(layer_state_sizes(config)):
        if isinstance(n, bool) or n < 1:
            raise ValueError(f"expected state_size of layer {layer_idx} to be an integer of at least 1, found {n}")
