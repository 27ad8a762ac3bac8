"""Configs of stock transformers models, read as configs of this package."""

from typing import Any, Self

from transformers import PreTrainedConfig


class StockConfigMixin:
    """For a config that extends the stock one of transformers, whose `model_type` is `stock_model_type`."""

    stock_model_type: str

    @classmethod
    def from_stock(cls, config: PreTrainedConfig, **options: Any) -> Self:
        """The config of the same model in this package; weights of the stock model fit it.

        Args:
            config: the stock config, whose `model_type` is `stock_model_type`.
            options: attributes to change.

        Raises:
            ValueError: a config of another model type.
        """
        if config.model_type != cls.stock_model_type:
            raise ValueError(f"expected a config of model type {cls.stock_model_type!r}, found {config.model_type!r}")
        return cls.from_dict(config.to_dict() | {"model_type": cls.model_type} | options)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        # `from_pretrained` reads this, and would warn of a stock checkpoint that its model type is not ours.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == cls.stock_model_type:
            config_dict = config_dict | {"model_type": cls.model_type}
        return config_dict, kwargs
