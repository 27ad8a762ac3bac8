"""Parameters sharded by FSDP2 (`fully_shard`): whole for a while, then sharded anew in their present shapes.

The objects that FSDP2 keeps for each parameter are private to torch; what is used of them is in this file alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of `model` are sharded."""
    return any(isinstance(param.data, DTensor) for param in model.parameters())


def reshard(model: nn.Module) -> None:
    """Put the shards back, as between two training steps: a forward pass alone leaves those of the root whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def find_obstacle(model: nn.Module) -> str:
    """Why sharded parameters of `model` cannot change shape; empty if they can, or if there are none."""
    known = _fsdp_params(model)
    for param in model.parameters():
        if not isinstance(param.data, DTensor):
            continue
        fsdp_param = known.get(id(param))
        if fsdp_param is None or fsdp_param.is_dtensor:
            return "they are sharded by something other than `fully_shard` (tensor parallel)"
        if param.device_mesh.ndim > 1:
            return f"their device mesh has {param.device_mesh.ndim} dimensions (hybrid sharding)"
        if fsdp_param.fsdp_placement.dim != 0:
            return f"they are sharded along dimension {fsdp_param.fsdp_placement.dim}"
        if fsdp_param.offload_to_cpu:
            return "they are offloaded to the CPU"
    return ""


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all ranks if it is sharded; to be called on all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all ranks have, sharded as `other` is, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def whole_parameters(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give `modules` of `model` their whole parameters in full precision; on all ranks together.

    What has another shape afterwards is sharded anew. The sharded `Parameter` stays the same object, to which the
    optimizer refers. Without FSDP2 nothing happens.
    """
    known = _fsdp_params(model)
    gathered = []
    for module in {id(m): m for root in modules for m in root.modules()}.values():
        for name, param in list(module._parameters.items()):
            if id(param) in known:
                plain = nn.Parameter(param.full_tensor().detach().clone(), param.requires_grad)
                vars(plain).update(vars(param))  # marks such as _no_weight_decay
                module._parameters[name] = plain
                gathered.append((module, name, param))
    try:
        yield
    finally:
        for module, name, param in gathered:
            plain = module._parameters[name]
            module._parameters[name] = param
            if plain.shape != param.shape:
                _shard_anew(known[id(param)], plain)


def _fsdp_params(model: nn.Module) -> dict:
    """What FSDP2 keeps of each parameter, by the identity of the sharded one, which is that of the module between two
    steps."""
    found = {}
    reshard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                found |= {id(fsdp_param.sharded_param): fsdp_param for fsdp_param in group.fsdp_params}
    return found


def _shard_anew(fsdp_param, plain: nn.Parameter) -> None:
    """Shard a parameter whose shape has changed, into the `Parameter` object that held the shard so far."""
    old, placement = fsdp_param.sharded_param, fsdp_param.fsdp_placement
    old.grad = None
    marks = dict(vars(old))
    fsdp_param._init_sharded_param(plain, fsdp_param.device, lambda _: placement, fsdp_param.mesh_info)
    if fsdp_param.post_forward_mesh_info:
        fsdp_param._init_sharded_post_forward_param_metadata(plain)
    fsdp_param.all_gather_outputs = []  # of the old size, and so is what lies on them
    if hasattr(fsdp_param, "_unsharded_param"):
        del fsdp_param._unsharded_param
    new = fsdp_param.sharded_param
    fsdp_param.sharded_param = None
    fsdp_param._setattr_on_modules(old)
    torch.utils.swap_tensors(old, new)
    vars(old).update(marks)
    fsdp_param.sharded_param = old
