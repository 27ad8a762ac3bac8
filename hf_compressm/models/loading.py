"""Loading of checkpoints whose state sizes must agree with the config beside them."""

import re

from transformers.modeling_utils import PreTrainedModel

from .per_layer import layer_state_sizes


class CheckedLoadingMixin:
    """For a `PreTrainedModel` with `layers.<i>.mixer`: `from_pretrained` refuses weights that the config does not fit.

    transformers gives such weights random values, or an error that names no shape.
    """

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        check_weights_fit(model, loading_info, load_config.ignore_mismatched_sizes)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def check_weights_fit(model: PreTrainedModel, loading_info, ignore_mismatched_sizes: bool) -> None:
    """Raise a ValueError when blocks of the model and of the checkpoint differ in number or in shape."""
    in_block = re.compile(r"(^|\.)layers\.(\d+)\.(mixer\.)?").search
    wrong = [
        f"{name}: config gives {tuple(expected)}, checkpoint has {tuple(found)}"
        for name, found, expected in sorted(loading_info.mismatched_keys)
        if in_block(name) or not ignore_mismatched_sizes
    ]
    wrong += [f"{name}: not in the checkpoint" for name in sorted(loading_info.missing_keys) if in_block(name)]
    wrong += [
        f"{name}: in the checkpoint only"
        for name in sorted(loading_info.unexpected_keys)
        if (match := in_block(name)) and (match[3] or int(match[2]) >= model.config.num_hidden_layers)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"the config does not fit the weights (num_hidden_layers={model.config.num_hidden_layers}, "
            f"hidden_size={model.config.hidden_size}, state sizes {layer_state_sizes(model.config)}):\n  "
            + "\n  ".join(wrong[:8])
            + more
            + "\nLoad the weights with the config.json that was saved beside them, or give the config their sizes."
        )
