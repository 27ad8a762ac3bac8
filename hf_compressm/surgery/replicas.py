"""Data-parallel replicas: one decision for all ranks, a reducer that knows the new shapes, and proof of equality."""

import gc
import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def find_replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """The `DistributedDataParallel` objects of this process that train parameters of `model`, wherever kept."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    gc.collect()  # a wrapper that is garbage on one rank only would leave the others waiting
    own = {id(p) for p in model.parameters()}
    wrappers = [obj for obj in gc.get_objects() if issubclass(type(obj), DistributedDataParallel)]
    return [ddp for ddp in wrappers if any(id(p) in own for p in ddp.parameters())]


def broadcast_from_main(compute: Callable[[], Any], process_group=None) -> Any:
    """Run `compute` on the first rank of the group and return its result on every rank.

    Raises:
        RuntimeError: on every rank, if `compute` failed on the first.
    """
    source = dist.get_global_rank(process_group, 0) if process_group is not None else 0
    box: list[Any] = [None, None]
    if dist.get_rank() == source:
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=source, group=process_group)
    if box[1] is not None:
        raise RuntimeError(f"The reduction failed on rank {source}: {box[1]}")
    return box[0]


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Rebuild the gradient reducer of `ddp` for the present shapes, on the same object, communication hooks included.

    The reducer caches the shapes of its buckets and hooks on the old gradient accumulators. Without this the ranks
    silently diverge after a reduction.
    """
    dist.barrier(ddp.process_group)
    ddp.reducer._remove_autograd_hooks()
    ddp.logger = None
    ddp.reducer = None  # must be gone before the new one is made: it owns the accumulators with the old shapes
    gc.collect()
    ddp._module_parameters = [p for n, p in ddp.module.named_parameters() if n not in ddp.parameters_to_ignore]
    parameters, expect_sparse = ddp._build_params_for_reducer()
    dist.utils._verify_param_shape_across_processes(ddp.process_group, parameters)
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)


def check_replicas_equal(model: nn.Module, process_group=None) -> None:
    """Compare a digest of all parameters over the ranks.

    Raises:
        RuntimeError: on every rank, if two ranks hold different weights.
    """
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        digest.update(f"{name}{tuple(param.shape)}".encode())
        digest.update(param.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(digests, digest.hexdigest(), group=process_group)
    if len(set(digests)) > 1:
        different = [rank for rank, d in enumerate(digests) if d != digests[0]]
        raise RuntimeError(
            f"After the reduction rank(s) {different} hold other weights than rank 0. Training on would diverge "
            "silently; resume from the last checkpoint, and check that all ranks build the same model."
        )
