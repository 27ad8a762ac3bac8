"""Data-parallel replicas: one decision for all ranks, a reducer that knows the new shapes, and proof of equality."""

import gc
import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from .preconditions import UnsupportedSetupError
from .sharding import whole

_PATIENCE = timedelta(minutes=5)  # with ranks that come late, for instance from writing a checkpoint


def find_replicas(model: nn.Module) -> list[DistributedDataParallel]:
    """The `DistributedDataParallel` objects of this process that train parameters of `model`, wherever kept."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    gc.collect()  # a wrapper that is garbage on one rank only would leave the others waiting
    own = {id(p) for p in model.parameters()}
    wrappers = [obj for obj in gc.get_objects() if issubclass(type(obj), DistributedDataParallel)]
    return [ddp for ddp in wrappers if any(id(p) in own for p in ddp.parameters())]


class Ranks:
    """Processes that hold the same model, see different data, and must take the same decisions.

    Args:
        group: the process group; None for the default one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    @classmethod
    def of(cls, model: nn.Module, replicas: list[DistributedDataParallel]) -> "Ranks | None":
        """Those that train `model`: the group of its replicas, or else all processes; None if this one is alone.

        Raises:
            UnsupportedSetupError: nothing keeps the weights equal on the processes, and they are not.
            RuntimeError: not all of them have come here.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        ranks = cls(replicas[0].process_group if replicas else None)
        ranks.meet()
        if not replicas and (different := ranks.differing(model)):
            raise UnsupportedSetupError(
                f"The processes of the default group hold different weights (rank(s) {different} other than rank 0), "
                "and no DistributedDataParallel keeps them equal, so that they cannot be reduced together. Wrap the "
                "model, or reduce it in a process without a process group (`torch.distributed.destroy_process_group`)."
            )
        return ranks

    def meet(self) -> None:
        """Wait for the other ranks; by the store, because a collective that some never join says nothing and hangs.

        Raises:
            RuntimeError: some have not come.
        """
        members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        store = dist.PrefixStore(f"compressm/{members}", dist.distributed_c10d._get_default_store())
        own = dist.get_rank()
        meeting = store.add(f"attended/{own}", 0)
        store.set(f"{meeting}/{own}", "here")
        try:
            store.wait([f"{meeting}/{rank}" for rank in members], _PATIENCE)
        except dist.DistStoreError as error:
            absent = [rank for rank in members if not store.check([f"{meeting}/{rank}"])]
            store.delete_key(f"{meeting}/{own}")
            raise RuntimeError(
                f"Expected all {len(members)} processes to take part in the reduction; found that rank(s) {absent} "
                f"did not within {_PATIENCE}. Call compress() on every rank, or, for the model of one process alone, "
                "after `torch.distributed.destroy_process_group()`."
            ) from error
        store.add(f"attended/{own}", 1)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order, on every rank."""
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def decide(self, compute: Callable[[], Any]) -> Any:
        """Run `compute` on the first rank of the group and return its result on every rank.

        Raises:
            RuntimeError: on every rank, if `compute` failed on the first.
        """
        box: list[Any] = [None, None]
        if dist.get_rank(self.group) == 0:
            try:
                box[0] = compute()
            except Exception as error:
                box[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        if box[1] is not None:
            raise RuntimeError(f"The reduction failed on the first rank: {box[1]}")
        return box[0]

    def differing(self, model: nn.Module) -> list[int]:
        """The ranks whose parameters differ from those of the first, bit for bit."""
        digest = hashlib.sha256()
        for name, param in model.named_parameters():
            digest.update(f"{name}{tuple(param.shape)}".encode())
            digest.update(whole(param.detach()).cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests = self.gather(digest.hexdigest())
        return [rank for rank, found in enumerate(digests) if found != digests[0]]


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
        if isinstance(state, PowerSGDState):  # remembers errors and factors of the old buckets
            _restart(state)
        ddp.register_comm_hook(state, hook)


def _restart(state: PowerSGDState) -> None:
    """Begin with plain averages once more, during which the buckets settle."""
    state.iter = 0
    for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        memory.clear()


def check_replicas_equal(model: nn.Module, ranks: Ranks, when: str = "After") -> None:
    """Compare all parameters over the ranks, "Before" or "After" the reduction.

    Beforehand, because what the first rank decides makes the reduced layers equal and hides that they were not.

    Raises:
        RuntimeError: on every rank, if two ranks hold different weights.
    """
    if different := ranks.differing(model):
        raise RuntimeError(
            f"{when} the reduction rank(s) {different} hold other weights than rank 0. Training on would diverge "
            "silently; resume from the last checkpoint, and check that all ranks build the same model."
        )
