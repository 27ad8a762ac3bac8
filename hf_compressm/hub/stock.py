"""Reduced models as stock checkpoints of transformers, which load without this package."""

from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PreTrainedConfig, PreTrainedModel

from ..models import ReducibleMamba2Config, ReducibleMambaConfig, layer_state_sizes

_STOCK_CONFIGS = {ReducibleMambaConfig: MambaConfig, ReducibleMamba2Config: Mamba2Config}


def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in the stock class of transformers: a `ReducibleMambaForCausalLM` as a `MambaForCausalLM`, ...

    Args:
        model: with one state size for all layers, and without maps after the convolution.

    Returns:
        A new model; its weights are copies.

    Raises:
        ValueError: there is no such stock model; what to do about it.
    """
    config = model.config
    stock_class = _STOCK_CONFIGS.get(type(config))
    if config.model_type in {cls.model_type for cls in _STOCK_CONFIGS.values()}:
        raise ValueError(
            f"a {config.model_type} model is a stock checkpoint already: load it with transformers as it is."
        )
    if stock_class is None:
        raise ValueError(
            f"transformers has no stock model for {config.model_type!r}. For people without this package put the code "
            "beside the weights: `hf-compressm export --to remote_code`."
        )
    sizes = layer_state_sizes(config)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"a stock {stock_class.model_type} model has one state size for all layers; found {sizes}. Reduce with "
            "`uniform=True` (`--uniform true`), or export with `--to remote_code`."
        )
    if any(getattr(layer, "conv_state_size", None) is not None for layer in config.per_layer_config):
        raise ValueError(
            "a stock mamba2 model has no maps after the convolution, which the balanced reduction of Mamba-2 leaves "
            'there. Reduce with `method="selection"` (`--method selection`), or export with `--to remote_code`.'
        )
    stock = AutoModelForCausalLM.from_config(_stock_config(config, stock_class), dtype=model.dtype)
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    return stock


def _stock_config(config: PreTrainedConfig, stock_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    ours = {"model_type", "architectures", "auto_map", "per_layer_config", "conv_state_size", "layer_types"}
    return stock_class.from_dict({key: value for key, value in config.to_dict().items() if key not in ours})
