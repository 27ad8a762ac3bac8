"""Set-ups under which shapes cannot change in place, each refused with the way out."""

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from .sharding import find_obstacle

_OFFLINE = (
    "Or stop the run at a checkpoint, reduce that with `hf-compressm reduce CHECKPOINT OUTPUT_DIR --data ...`, and go "
    "on from the result with your own launcher."
)


class UnsupportedSetupError(ValueError):
    """The model is wrapped, sharded, quantised or adapted in a way that does not survive a change of shape."""


def check_model(model: nn.Module) -> None:
    """Refuse models whose parameters cannot change shape in place.

    Args:
        model: wrapped or not.

    Raises:
        UnsupportedSetupError: what was found and what to do instead.
    """
    if isinstance(model, nn.DataParallel):
        raise UnsupportedSetupError(
            "torch.nn.DataParallel copies the model at every step and is not supported. "
            "Launch one process per device with `torchrun` or `accelerate launch` (DistributedDataParallel)."
        )
    if any(type(m).__name__ == "DeepSpeedEngine" for m in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise UnsupportedSetupError(
            "DeepSpeed keeps its own flat copies of parameters and optimizer state, which a reduction cannot reach. "
            f"Use DistributedDataParallel. {_OFFLINE}"
        )
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise UnsupportedSetupError(
            "FSDP flattens the parameters of a block. Use FSDP2 (`fsdp_version: 2`) or DistributedDataParallel. "
            f"{_OFFLINE}"
        )
    if obstacle := find_obstacle(model):
        raise UnsupportedSetupError(
            f"The parameters cannot change shape, because {obstacle}. Use `fully_shard` (FSDP2) on one group of "
            f"processes or DistributedDataParallel. {_OFFLINE}"
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise UnsupportedSetupError(
            "Some parameters are on the meta device (offloaded by `device_map`). Load the model with enough memory, "
            "without offloading, before reducing it."
        )
    if any(getattr(m, "is_quantized", False) or getattr(m, "quantization_method", None) for m in model.modules()):
        raise UnsupportedSetupError(
            "The model is quantised. Reduce the model in its original precision first, and quantise the result."
        )
    if any(getattr(m, "peft_config", None) for m in model.modules()):
        raise UnsupportedSetupError(
            "The model carries PEFT adapters, whose checkpoints omit the base model that a reduction would change: "
            "loaded on the old base, they would make another model. Reduce the base model, save it, and add adapters "
            "to that; or call `merge_and_unload()` and reduce what comes out."
        )
