"""One pass over a model: weights → Gramians → Hankel singular values → ranks → bases → weights, moments, config."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .config import CompressionConfig
from .mor import RANK_RULES, RankRule, RelativeError, Spectrum, TargetStateSize, apply_constraints
from .observation import Loss, Observation, evaluation_mode, first_batches, model_loss
from .reducers import Reduction, StateReducer, allow_other_sizes, find_reducible, refuse_layers, supported_layers
from .report import CompressionEvent, CompressionReport, LayerReport
from .search import largest_reduction
from .surgery import (
    Ranks,
    UnsupportedSetupError,
    adopt_parameters,
    averages_of,
    carry_state,
    check_adoption,
    check_model,
    check_optimizer,
    check_replicas_equal,
    drop_stale_state,
    find_replicas,
    is_sharded,
    rebuild_reducer,
    release_parameters,
    reset_state,
    reshard,
    whole_parameters,
)

logger = logging.getLogger(__name__)

# A layer that cannot be reduced is left alone: whatever linear algebra and memory can throw (LinAlgError and
# OutOfMemoryError are RuntimeErrors) is a reason to skip it, never to end a run.
_LAYER_FAILURES = (ArithmeticError, ValueError, RuntimeError)


def compress(
    model: nn.Module,
    config: CompressionConfig | None = None,
    dataloader: Iterable | None = None,
    optimizer: Optimizer | None = None,
    **options,
) -> CompressionReport:
    """Reduce the states of a model in place, once.

    For a finished checkpoint, or between two steps of a plain training loop (after `optimizer.step()` and
    `optimizer.zero_grad()`; under DistributedDataParallel on all ranks together). Inside a `Trainer` use
    `CompreSSMCallback`. The schedule of the config plays no part here.

    Args:
        model: any model with reducible layers, wrapped (DistributedDataParallel, `torch.compile`) or not.
        config: the options; or give them by name.
        dataloader: calibration batches (dictionaries of model inputs), of which `calibration_batches` are used: for
            `max_loss_increase`, and for architectures whose Gramians depend on the input. Those of the MIMO SSM have a
            closed form.
        optimizer: the one that trains `model`; its moments follow the change of basis.
        **options: fields of `CompressionConfig`, instead of `config`.

    Returns:
        A report with one event. Layers that were left alone say why.

    Raises:
        ValueError: nothing is reducible, an option does not fit the model, the optimizer cannot follow, or the set-up
            is unsupported (`UnsupportedSetupError`). The model is then unchanged.

    Example:

    ```python
    >>> from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM, compress

    >>> model = MimoSSMForCausalLM(MimoSSMConfig(vocab_size=16, hidden_size=4, state_size=32, num_hidden_layers=1))
    >>> report = compress(model, target_state_size=8)
    >>> report.state_sizes
    {'model.layers.0.mixer': 8}

    ```
    """
    config = resolve_config(config, options)
    check_support(model, config, optimizer)
    observation, loss = calibrate(extract_model_from_parallel(model), config, dataloader)
    event = compress_once(model, config, optimizer, observation, loss)
    return CompressionReport(config.to_dict(), [event])


def hankel_singular_values(
    model: nn.Module, dataloader: Iterable | None = None, method: str = "auto"
) -> dict[str, Tensor]:
    """The Hankel singular values of every reducible layer: how much each state direction matters to the layer's map.

    Args:
        model: as for `compress`; it is not changed.
        dataloader: as for `compress`.
        method: as in `CompressionConfig`.

    Returns:
        By layer name, float64 on the CPU, descending. A MIMO SSM with n states has 2n of them under real balancing.

    Raises:
        ValueError: nothing is reducible.
        ArithmeticError: a layer is unstable or not finite.

    Example:

    ```python
    >>> from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM, hankel_singular_values

    >>> model = MimoSSMForCausalLM(MimoSSMConfig(vocab_size=16, hidden_size=4, state_size=32, num_hidden_layers=1))
    >>> hankel_singular_values(model)["model.layers.0.mixer"].shape
    torch.Size([64])

    ```
    """
    observation, _ = calibrate(extract_model_from_parallel(model), CompressionConfig(method=method), dataloader)
    return {name: reducer.spectrum().hsv.cpu() for name, reducer in observation.reducers.items()}


def resolve_config(config: CompressionConfig | None, options: dict) -> CompressionConfig:
    """A config given whole or by its fields, not both."""
    if config is None:
        return CompressionConfig(**options)
    if options:
        raise ValueError(f"Expected a config or its fields by name; found both (the config and {sorted(options)}).")
    return config


def check_support(
    model: nn.Module, config: CompressionConfig, optimizer: Optimizer | None = None, resumed: bool = False
) -> None:
    """Refuse, before anything is changed, whatever would fail or do silent damage later.

    Args:
        model, config, optimizer: as for `compress`.
        resumed: reductions may have taken place already.

    Raises:
        ValueError: what was expected, what was found, what to do.
    """
    check_model(model)
    refuse_layers(model)
    check_optimizer(optimizer, config.moments)
    base = extract_model_from_parallel(model)
    if (why := averages_of(base)) and not config.dry_run:
        raise UnsupportedSetupError(f"The model cannot be reduced: {why}.")
    reducers = _reducers(base, config)
    rule, value = config.rule
    largest = max(reducer.state_size for reducer in reducers.values())
    if not resumed and rule == "target_state_size" and value > largest:
        raise ValueError(
            f"target_state_size={value} is above the present state size {largest}. A reduction only removes states: "
            "choose a smaller target or start from a larger model."
        )
    if is_sharded(base):
        _check_sharded(config, reducers)
    growing = [r.module for r in reducers.values() if r.added_parameters and r.method == "balanced"]
    if growing:
        check_adoption(optimizer, base, growing)
    if config.uniform is False and _uniform(reducers, None):
        raise ValueError(
            f"uniform=False needs a state size per layer, which {type(model).__name__} does not have. Leave `uniform` "
            "out, or train the reducible class of this architecture."
        )


def _check_sharded(config: CompressionConfig, reducers: Mapping[str, StateReducer]) -> None:
    """Refuse what one rank cannot do alone, or what `fully_shard` has no place for."""
    if config.rule[0] == "max_loss_increase" or config.rollback_metric:
        raise UnsupportedSetupError(
            "`max_loss_increase` and `rollback_metric` put trial or former weights in place, which is not supported "
            "while FSDP2 shards them. Choose another rank rule without rollback, or DistributedDataParallel."
        )
    for name, reducer in reducers.items():
        new = [n for n in reducer.added_parameters if getattr(reducer.module, n, None) is None]
        if new and reducer.method == "balanced":
            raise UnsupportedSetupError(
                f"A balanced reduction of {name} adds the parameters {', '.join(new)}, for which FSDP2 has no place. "
                'Use method="selection", or DistributedDataParallel.'
            )


def compress_once(
    model: nn.Module,
    config: CompressionConfig,
    optimizer: Optimizer | None = None,
    observation: Observation | None = None,
    loss: Loss | None = None,
    step: int | None = None,
    remaining_events: int = 1,
    before_change: Callable[[], str] | None = None,
) -> CompressionEvent:
    """One event on a model that `check_support` accepts.

    Args:
        model, config, optimizer: as for `compress`.
        observation: what the layers have seen, if any of them needs it; made by `observe`, and used up.
        loss: the loss to watch, for `max_loss_increase`.
        step: the optimizer step that the report names.
        remaining_events: events left including this one, for rules that spread a reduction over several.
        before_change: called on all ranks when something is about to change; returns why it must not, or "".
    """
    started = time.perf_counter()
    base = extract_model_from_parallel(model)
    observation = observation or observe(base, config)
    observation.stop()
    reducers = observation.reducers
    reshard(base)
    replicas = find_replicas(base)
    ranks = Ranks.of(base, replicas)
    if replicas:
        check_replicas_equal(base, ranks, "Before")
    planner = _Planner(reducers, config, remaining_events, loss, show_progress=step is None)
    if ranks is not None:
        observation.reduce_over_ranks(ranks)
    with whole_parameters(base, [reducer.module for reducer in reducers.values()]):
        # rounding differs between machines: one rank decides for all
        plans = planner.plans() if ranks is None else ranks.decide(lambda: _on_cpu(planner.plans()))
    changes = {name: plan.reduction for name, plan in plans.items() if plan.reduction is not None}
    if changes and not config.dry_run and (why := _obstacle(base, ranks, before_change)):
        for name in changes:
            plans[name].leave(why)
        changes = {}
    if changes and not config.dry_run:
        _apply(base, reducers, changes, config, optimizer)
        torch._dynamo.reset()  # compiled code has the old shapes
    if (changes and not config.dry_run) or planner.by_loss:  # trying sizes has touched the parameters of one rank
        for replica in replicas:
            rebuild_reducer(replica)
        if ranks is not None:
            check_replicas_equal(base, ranks)
    event = CompressionEvent([plan.report for plan in plans.values()], time.perf_counter() - started, step)
    event.dry_run, event.rule = config.dry_run, "{}={:g}".format(*config.rule)
    for layer in event.layers:
        if layer.note:
            logger.warning("%s keeps its %d states: %s", layer.name, layer.before, layer.note)
    return event


def _obstacle(model: nn.Module, ranks: Ranks | None, before_change: Callable[[], str] | None) -> str:
    """Why nothing must change now, on every rank; empty if it may."""
    found = averages_of(model)
    found = next(filter(None, ranks.gather(found)), "") if ranks is not None else found
    return found or (before_change() if before_change is not None else "")


def observe(model: nn.Module, config: CompressionConfig, training_only: bool = True) -> Observation:
    """Begin to watch the layers of a model for one event; `start` attaches the hooks.

    Args:
        model: as for `compress`.
        config: the options of the event.
        training_only: see only forward passes in training mode.

    Raises:
        ValueError: nothing is reducible, or not by `config.method`.
    """
    return Observation(_reducers(extract_model_from_parallel(model), config), training_only)


def sync_config(model: nn.Module) -> None:
    """Bring the configs in an unwrapped model up to the sizes of its layers, as after loading other weights."""
    for owner in model.modules():
        if isinstance(getattr(owner, "config", None), PreTrainedConfig):
            for module, reducer_class in find_reducible(owner).values():
                reducer_class(module).sync_config(owner.config)


def adopt_new_parameters(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Give the optimizer the parameters that reducible layers of an unwrapped model gained, as by loading weights."""
    for module, reducer_class in find_reducible(model).values():
        if added := reducer_class.added_parameters:
            adopt_parameters(optimizer, model, module, added, reducer_class.state_parameters[0])


def added_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of an unwrapped model that reductions gave to its layers."""
    found = [(module, name) for module, cls in find_reducible(model).values() for name in cls.added_parameters]
    return [param for module, name in found if (param := getattr(module, name, None)) is not None]


class Sizes:
    """The shapes in an unwrapped model at one moment, after which weights of other sizes may come in."""

    def __init__(self, model: nn.Module):
        self._shapes = {param: param.shape for param in model.parameters()}
        self._added = added_parameters(model)

    def follow(self, model: nn.Module, optimizer: Optimizer | None) -> bool:
        """Bring the optimizer and the configs up to the present shapes.

        The optimizer lets go of parameters that the layers no longer have, takes those that are new, and loses the
        state that no longer fits.

        Returns:
            Whether any parameter has come, gone or changed its shape.
        """
        present = {param: param.shape for param in model.parameters()}
        release_parameters(optimizer, [param for param in self._added if param not in present])
        adopt_new_parameters(model, optimizer)
        drop_stale_state(optimizer, [param for param, shape in self._shapes.items() if param.shape != shape])
        sync_config(model)
        return present != self._shapes


def accept_other_sizes(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Let `load_state_dict`, and so `accelerator.load_state`, bring other state sizes into a model that is in use.

    The optimizer takes the parameters that come with the weights, lets go of those that they lack, and loses the state
    that no longer fits; configs follow, and replicas are made anew for the present shapes. `CompreSSMCallback` does
    this by itself; in a loop of your own call it once, on all ranks, after `accelerator.prepare`.

    Args:
        model: any model with reducible layers, wrapped or not.
        optimizer: the one that trains it, wrapped or not.
    """
    base = extract_model_from_parallel(model)
    allow_other_sizes(base)
    before: list[Sizes] = []

    def note_sizes(loaded: nn.Module, *_) -> None:
        before[:] = [Sizes(loaded)]

    def follow(loaded: nn.Module, _) -> None:
        if not before.pop().follow(loaded, optimizer):
            return
        for replica in find_replicas(loaded):
            rebuild_reducer(replica)
        torch._dynamo.reset()

    base.register_load_state_dict_pre_hook(note_sizes)
    base.register_load_state_dict_post_hook(follow)


def calibrate(model: nn.Module, config: CompressionConfig, dataloader: Iterable | None):
    """Observation and loss from a data loader, as far as the model and the rule need them."""
    observation = observe(model, config, training_only=False)
    by_loss = config.rule[0] == "max_loss_increase"
    if not (observation.needed or by_loss):
        return observation, None
    if dataloader is None:
        why = "max_loss_increase measures the loss" if by_loss else "the Gramians of this model depend on its input"
        raise ValueError(f"Expected calibration batches, because {why}: pass `dataloader`.")
    device = next(model.parameters()).device
    batches = first_batches(dataloader, config.calibration_batches, device)
    observation.start()
    try:
        if observation.needed:
            with evaluation_mode(model), torch.no_grad():
                for batch in tqdm(batches, desc="observing", unit="batch", leave=False, disable=None):
                    model(**batch)
    finally:
        observation.stop()
    return observation, model_loss(model, batches) if by_loss else None


@dataclass
class _Plan:
    """What is to become of one layer."""

    report: LayerReport
    reduction: Reduction | None = None

    def accept(self, reduction: Reduction) -> None:
        """Plan a reduction."""
        self.reduction = reduction
        self.report.after = reduction.state_size
        for name in ("method", "energy_discarded", "error_bound", "relative_error"):
            setattr(self.report, name, getattr(reduction, name))

    def leave(self, why: str) -> None:
        """Plan none after all."""
        kept = LayerReport(self.report.name, self.report.before, self.report.before, note=why)
        self.reduction = None
        self.report = replace(kept, hankel_singular_values=self.report.hankel_singular_values)


def _reducers(model: nn.Module, config: CompressionConfig) -> dict[str, StateReducer]:
    found = find_reducible(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer whose state can be reduced; known layers are "
            f"{', '.join(supported_layers())}. Other architectures join with `register_reducer`."
        )
    reducers = {name: cls(module, config.method, config.seed) for name, (module, cls) in found.items()}
    if dist.is_available() and dist.is_initialized():
        for reducer in reducers.values():
            reducer.rank, reducer.ranks = dist.get_rank(), dist.get_world_size()
    return reducers


class _Planner:
    """Decides on every layer; the model is as before afterwards."""

    def __init__(
        self,
        reducers: Mapping[str, StateReducer],
        config: CompressionConfig,
        remaining_events: int,
        loss: Loss | None,
        show_progress: bool = False,
    ):
        self._progress = partial(tqdm, unit="layer", leave=False, disable=None if show_progress else True)
        self.reducers, self.config, self.remaining_events, self.loss = reducers, config, remaining_events, loss
        self.by_loss = config.rule[0] == "max_loss_increase"
        self.spectra: dict[str, Spectrum] = {}
        self._reductions: dict[tuple[str, int], Reduction | Exception] = {}

    def plans(self) -> dict[str, _Plan]:
        """What is to become of each layer."""
        plans = {n: _Plan(LayerReport(n, r.state_size, r.state_size)) for n, r in self.reducers.items()}
        for name, reducer in self._progress(self.reducers.items(), desc="Gramians"):
            try:
                with _one_thread():
                    self.spectra[name] = reducer.spectrum()
            except _LAYER_FAILURES as error:
                plans[name].report.note = f"{type(error).__name__}: {error}"
            else:
                values = self.spectra[name].hsv.tolist()
                plans[name].report.hankel_singular_values = [float(f"{value:.5e}") for value in values]
        for name, size in self._progress(self._sizes().items(), desc="reductions"):
            outcome = self._reduction(name, size)
            if isinstance(outcome, Exception):
                plans[name].report.note = f"{type(outcome).__name__}: {outcome}"
            elif outcome is not None:
                plans[name].accept(outcome)
        if _uniform(self.reducers, None):
            _keep_all_unless_equal(plans)
        return plans

    def _sizes(self) -> dict[str, int]:
        if not self.spectra:
            return {}
        name, value = self.config.rule
        if self.by_loss:
            sizes, _ = largest_reduction(lambda e: self._constrained(RelativeError(e)), self._loss_increase(), value)
            return sizes
        if name == "target_state_size":
            return self._constrained(TargetStateSize(value, self.remaining_events, budget=self.config.budget))
        return self._constrained(RANK_RULES[name](value, budget=self.config.budget))

    def _constrained(self, rule: RankRule) -> dict[str, int]:
        layers = list(self.spectra.values())
        # the target is reached at the last event, however near it is
        exact = isinstance(rule, TargetStateSize) and self.remaining_events == 1
        sizes = apply_constraints(
            rule(layers),
            layers,
            min_state_size=self.config.min_state_size,
            multiple_of=self.config.multiple_of,
            min_reduction=0.0 if exact else self.config.min_reduction,
            uniform=_uniform(self.reducers, self.config.uniform),
        )
        return dict(zip(self.spectra, sizes, strict=True))

    def _reduction(self, name: str, size: int) -> Reduction | Exception | None:
        """The layer at a size, computed once; None if that is its present size, the error if it cannot be."""
        reducer = self.reducers[name]
        if size >= reducer.state_size:
            return None
        if (name, size) not in self._reductions:
            try:
                with _one_thread():
                    self._reductions[name, size] = reducer.reduce(size)
            except _LAYER_FAILURES as error:
                self._reductions[name, size] = error
        return self._reductions[name, size]

    def _loss_increase(self) -> Callable[[dict[str, int]], float]:
        """A function that puts reductions in place, measures the loss, and puts the old weights back."""
        before = self.loss()

        def increase(sizes: dict[str, int]) -> float:
            found = {name: self._reduction(name, size) for name, size in sizes.items()}
            trial = {name: r for name, r in found.items() if isinstance(r, Reduction)}
            old = {name: (self.reducers[name].state_size, self._weights(name)) for name in trial}
            try:
                for name, reduction in trial.items():
                    self.reducers[name].apply(reduction)
                return self.loss() - before
            finally:
                for name, (size, weights) in old.items():
                    self.reducers[name].restore(size, weights)

        return increase

    def _weights(self, name: str) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.reducers[name].module.state_dict().items()}


@contextmanager
def _one_thread():
    """Dense eigenvalue routines synchronise their threads so often that on a busy machine several take a hundred times
    longer than one; and one gives the same bits whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _uniform(reducers: Mapping[str, StateReducer], wanted: bool | None) -> bool:
    """Whether all layers take one size: as wanted, and where a stock class has only one size for all."""
    return bool(wanted) or any(reducer.uniform for reducer in reducers.values())


def _keep_all_unless_equal(plans: dict[str, _Plan]) -> None:
    """Drop a plan that would give a class with one size for all layers different ones."""
    if len({plan.report.after for plan in plans.values()}) > 1:
        for plan in plans.values():
            why = "another layer cannot follow, and this class has one state size for all layers"
            plan.leave(plan.report.note or why)


def _on_cpu(plans: dict[str, _Plan]) -> dict[str, _Plan]:
    """The plans in a form that another process can unpack, whatever devices it has."""
    for plan in plans.values():
        if plan.reduction is not None:
            reduction = plan.reduction
            parameters = {name: value.cpu() for name, value in reduction.parameters.items()}
            maps = [replace(m, matrix=m.matrix.cpu()) for m in reduction.gradient_maps]
            plan.reduction = replace(reduction, parameters=parameters, gradient_maps=maps)
    return plans


def _apply(
    model: nn.Module,
    reducers: dict[str, StateReducer],
    changes: dict[str, Reduction],
    config: CompressionConfig,
    optimizer: Optimizer | None,
) -> None:
    """Put the reductions in place: first the optimizer's state, which is told by the old shapes, then the weights."""
    for name, reduction in changes.items():
        present = dict(reducers[name].module.named_parameters())
        params = {key: present[key] for key in reduction.parameters if key in present}
        if config.moments == "carry":
            carry_state(optimizer, params, reduction.gradient_maps)
        else:
            reset_state(optimizer, list(params.values()))
        with whole_parameters(model, [reducers[name].module]):
            reducers[name].apply(reduction)
    adopt_new_parameters(model, optimizer)
    sync_config(model)
