"""One pass over a model: weights → Gramians → Hankel singular values → ranks → bases → new weights, moments, config."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import CompressionConfig
from .mor import RANK_RULES, RankRule, Spectrum, TargetStateSize, apply_constraints
from .reducers import Reduction, StateReducer, find_reducible, supported_layers
from .report import CompressionEvent, CompressionReport, LayerReport
from .surgery import (
    broadcast_from_main,
    carry_state,
    check_model,
    check_optimizer,
    check_replicas_equal,
    find_replicas,
    rebuild_reducer,
    reset_state,
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
        dataloader: calibration batches, for architectures whose Gramians depend on the input. The Gramians of the
            MIMO SSM have a closed form and need none.
        optimizer: the one that trains `model`; its moments follow the change of basis.
        **options: fields of `CompressionConfig`, instead of `config`.

    Returns:
        A report with one event. Layers that were left alone say why.

    Raises:
        ValueError: nothing is reducible, an option does not fit the model, the optimizer cannot follow, or the set-up
            is unsupported (`UnsupportedSetupError`). The model is then unchanged.
    """
    config = resolve_config(config, options)
    check_support(model, config, optimizer)
    event = compress_once(model, config, optimizer)
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
    """
    reducers = _reducers(extract_model_from_parallel(model), CompressionConfig(method=method))
    return {name: reducer.spectrum().hsv.cpu() for name, reducer in reducers.items()}


def resolve_config(config: CompressionConfig | None, options: dict) -> CompressionConfig:
    """A config given whole or by its fields, not both."""
    if config is None:
        return CompressionConfig(**options)
    if options:
        raise ValueError(f"Expected a config or its fields by name; found both (the config and {sorted(options)}).")
    return config


def check_support(model: nn.Module, config: CompressionConfig, optimizer: Optimizer | None = None) -> None:
    """Refuse, before anything is changed, whatever would fail or do silent damage later.

    Raises:
        ValueError: what was expected, what was found, what to do.
    """
    check_model(model)
    check_optimizer(optimizer, config.moments)
    reducers = _reducers(extract_model_from_parallel(model), config)
    rule, value = config.rule
    smallest = min(reducer.state_size for reducer in reducers.values())
    if rule == "target_state_size" and value > smallest:
        raise ValueError(
            f"target_state_size={value} is above the present state size {smallest}. A reduction only removes states: "
            "choose a smaller target or start from a larger model."
        )


def compress_once(
    model: nn.Module,
    config: CompressionConfig,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    remaining_events: int = 1,
) -> CompressionEvent:
    """One event on a model that `check_support` accepts.

    Args:
        model, config, optimizer: as for `compress`.
        step: the optimizer step that the report names.
        remaining_events: events left including this one, for rules that spread a reduction over several.
    """
    started = time.perf_counter()
    base = extract_model_from_parallel(model)
    reducers = _reducers(base, config)
    replicas = find_replicas(base)
    if replicas:
        # rounding differs between machines: one rank decides for all
        plans = broadcast_from_main(lambda: _plan(reducers, config, remaining_events), replicas[0].process_group)
    else:
        plans = _plan(reducers, config, remaining_events)
    changes = {name: plan.reduction for name, plan in plans.items() if plan.reduction is not None}
    if changes and not config.dry_run:
        _apply(reducers, changes, config, optimizer)
        for replica in replicas:
            rebuild_reducer(replica)
            check_replicas_equal(base, replica.process_group)
        torch._dynamo.reset()  # compiled code has the old shapes
    event = CompressionEvent([plan.report for plan in plans.values()], time.perf_counter() - started, step)
    event.dry_run = config.dry_run
    for layer in event.layers:
        if layer.note:
            logger.warning("%s keeps its %d states: %s", layer.name, layer.before, layer.note)
    return event


@dataclass
class _Plan:
    """What is to become of one layer."""

    report: LayerReport
    reduction: Reduction | None = None


def _reducers(model: nn.Module, config: CompressionConfig) -> dict[str, StateReducer]:
    found = find_reducible(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer whose state can be reduced; known layers are "
            f"{', '.join(supported_layers())}. Other architectures join with `register_reducer`."
        )
    return {name: cls(module, config.method, config.seed) for name, (module, cls) in found.items()}


def _plan(reducers: dict[str, StateReducer], config: CompressionConfig, remaining_events: int) -> dict[str, _Plan]:
    """Decide on every layer, without changing anything."""
    plans = {n: _Plan(LayerReport(n, r.state_size, r.state_size)) for n, r in reducers.items()}
    spectra: dict[str, Spectrum] = {}
    for name, reducer in reducers.items():
        try:
            spectra[name] = reducer.spectrum()
            plans[name].report.hankel_singular_values = [float(f"{s:.5e}") for s in spectra[name].hsv.tolist()]
        except _LAYER_FAILURES as error:
            plans[name].report.note = f"{type(error).__name__}: {error}"
    for name, size in _sizes(spectra, config, remaining_events).items():
        if size >= reducers[name].state_size:
            continue
        try:
            plan = plans[name]
            plan.reduction = reducers[name].reduce(size)
            plan.report.after = plan.reduction.state_size
            plan.report.method = plan.reduction.method
            plan.report.energy_discarded = plan.reduction.energy_discarded
            plan.report.error_bound = plan.reduction.error_bound
            plan.report.relative_error = plan.reduction.relative_error
        except _LAYER_FAILURES as error:
            plan.report.note = f"{type(error).__name__}: {error}"
    return plans


def _rank_rule(config: CompressionConfig, remaining_events: int) -> RankRule:
    name, value = config.rule
    if name == "target_state_size":
        return TargetStateSize(value, remaining_events, budget=config.budget)
    return RANK_RULES[name](value, budget=config.budget)


def _sizes(spectra: dict[str, Spectrum], config: CompressionConfig, remaining_events: int) -> dict[str, int]:
    if not spectra:
        return {}
    rule = _rank_rule(config, remaining_events)
    layers = list(spectra.values())
    exact = isinstance(rule, TargetStateSize) and remaining_events == 1  # the target is reached, however near it is
    sizes = apply_constraints(
        rule(layers),
        layers,
        min_state_size=config.min_state_size,
        multiple_of=config.multiple_of,
        min_reduction=0.0 if exact else config.min_reduction,
        uniform=bool(config.uniform),
    )
    return dict(zip(spectra, sizes, strict=True))


def _apply(
    reducers: dict[str, StateReducer],
    changes: dict[str, Reduction],
    config: CompressionConfig,
    optimizer: Optimizer | None,
) -> None:
    """Put the reductions in place: first the optimizer's state, which is told by the old shapes, then the weights."""
    for name, reduction in changes.items():
        module = reducers[name].module
        params = {key: module.get_parameter(key) for key in reduction.parameters}
        if config.moments == "carry":
            carry_state(optimizer, params, reduction.gradient_maps)
        else:
            reset_state(optimizer, list(params.values()))
        reducers[name].apply(reduction)
