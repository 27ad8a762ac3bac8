"""Layers that look reducible and are not, told by the name of their class: importing them all would be slow."""

from torch import nn

_NORMALISED = (
    "normalises B and C after `x_proj`, so that a change of basis does not fold into its weights; train a Mamba model "
    "(`MambaForCausalLM` or `ReducibleMambaForCausalLM`) instead"
)
_HYBRID = (
    "is the state space layer of a hybrid model, whose other layers share its config; only `Mamba2ForCausalLM` and "
    "`ReducibleMamba2ForCausalLM` can be reduced"
)
REFUSED_LAYERS = {
    "FalconMambaMixer": _NORMALISED,
    "JambaMambaMixer": _NORMALISED,
    "ZambaMambaMixer": _HYBRID,
    "Zamba2MambaMixer": _HYBRID,
    "BambaMixer": _HYBRID,
    "FalconH1Mixer": _HYBRID,
    "NemotronHMamba2Mixer": _HYBRID,
    "GraniteMoeHybridMambaLayer": _HYBRID,
}
"""Why a layer of this class, or of a subclass, is left alone."""


def refuse_layers(model: nn.Module) -> None:
    """Name the layers of a model that are known and cannot be reduced.

    Raises:
        ValueError: there is one.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in REFUSED_LAYERS:
                raise ValueError(f"{name} is a {cls.__name__}, which {REFUSED_LAYERS[cls.__name__]}.")
