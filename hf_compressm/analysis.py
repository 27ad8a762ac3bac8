"""What reductions of several strengths would keep, cost and gain, without changing the model."""

import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from tqdm.auto import tqdm

from .compression import calibrate, check_support, compress, compress_once, resolve_config
from .config import CompressionConfig
from .observation import Observation, first_batches
from .report import CompressionEvent
from .surgery import UnsupportedSetupError, is_sharded

logger = logging.getLogger(__name__)

TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)
_REPEATS = 5  # of which the fastest counts: other work on the machine only makes a step slower


@dataclass(frozen=True)
class StepCost:
    """A training step (forward and backward pass) of a model, measured on one batch.

    Attributes:
        parameters: number of parameters.
        seconds: of the fastest of some steps; None without a batch.
        activation_bytes: what autograd keeps for the backward pass; None without a batch.
    """

    parameters: int
    seconds: float | None = None
    activation_bytes: int | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Activations, and four float32 numbers per parameter: weight, gradient and the two moments of Adam."""
        return None if self.activation_bytes is None else self.activation_bytes + 16 * self.parameters


@dataclass(frozen=True)
class Candidate:
    """One strength: the rule, what it would do to each layer, and what a step would cost then.

    `speedup` compares steps that took turns with those of the model as it is; None without a batch.
    """

    rule: str
    event: CompressionEvent
    step: StepCost
    speedup: float | None


@dataclass(frozen=True)
class Analysis:
    """What `analyze` found; `str` of it is a table.

    Attributes:
        candidates: one per rank rule.
        step: the cost of a training step of the model as it is.
        batch: shape of the batch that the steps were measured on; None if there was none.
    """

    candidates: list[Candidate]
    step: StepCost
    batch: tuple[int, ...] | None = None

    def to_dict(self) -> dict:
        """Plain types only, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        layers = range(len(self.candidates[0].event.layers))
        at = [[candidate.event.layers[index] for candidate in self.candidates] for index in layers]
        rows = [["states kept", "now", *(candidate.rule for candidate in self.candidates)]]
        rows += [[cells[0].name, f"{cells[0].before}", *(f"{cell.after}" for cell in cells)] for cells in at]
        for title, attribute in (
            ("bound of the H∞ error, 2 Σσ discarded", "error_bound"),
            ("relative error of the output", "relative_error"),
            ("part of Σσ discarded", "energy_discarded"),
        ):
            values = [[getattr(c, attribute) if c.after < c.before else None for c in cells] for cells in at]
            if any(value is not None for row in values for value in row):
                rows += [[], [title]]
                rows += [[cells[0].name, "", *map(_number, row)] for cells, row in zip(at, values, strict=True)]
        rows += [[], self._row("parameters", "parameters", "{:,.0f}")]
        if self.step.seconds is not None:
            rows.append(self._row("training step, ms", "seconds", "{:.1f}", 1e3))
            rows.append(self._row("memory of a step, MB", "memory_bytes", "{:.1f}", 1e-6))
            rows.append(["faster by", "", *(f"{candidate.speedup:.2f}×" for candidate in self.candidates)])
        notes = [f"{c.name} keeps its {c.before} states: {c.note}" for c in self.candidates[0].event.layers if c.note]
        if self.batch is None:
            notes.append("Without a batch that the model takes no training step was measured.")
        else:
            notes.append(
                f"Steps, forward and backward, were measured on a batch of shape {'×'.join(map(str, self.batch))}: "
                f"the fastest of {_REPEATS} that took turns with the model as it is. Memory: what autograd keeps, and "
                "16 bytes per parameter (float32 weights, gradients, moments of Adam)."
            )
        return "\n".join([_aligned(rows), "", *notes])

    def _row(self, title: str, attribute: str, form: str, unit: float = 1) -> list[str]:
        steps = [self.step, *(candidate.step for candidate in self.candidates)]
        return [title, *(form.format(unit * getattr(step, attribute)) for step in steps)]


def analyze(
    model: nn.Module,
    dataloader: Iterable | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    config: CompressionConfig | None = None,
    **options,
) -> Analysis:
    """What each of several tolerances would keep of every layer, and what a training step would cost then.

    The model is not changed; copies of it are reduced, one at a time.

    Args:
        model: as for `compress`.
        dataloader: as for `compress`; steps are measured on its first batch. Without it there is no such measurement.
        tolerances: to be compared. If `config` has another rank rule, or a tolerance that is not among these, that is
            one more candidate.
        config: the other options; or give them by name.
        **options: fields of `CompressionConfig`, instead of `config`.

    Raises:
        ValueError: as for `compress`; or the model is sharded.

    Example:

    ```python
    >>> from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM, analyze

    >>> model = MimoSSMForCausalLM(MimoSSMConfig(vocab_size=16, hidden_size=4, state_size=32, num_hidden_layers=1))
    >>> weak, strong = analyze(model, tolerances=[0.01, 0.5]).candidates
    >>> weak.event.layers[0].after > strong.event.layers[0].after
    True

    ```
    """
    config = resolve_config(config, options)
    check_support(model, config)
    check_whole(model)
    base = extract_model_from_parallel(model)
    batches = list(islice(dataloader, config.calibration_batches)) if dataloader is not None else None
    batch = first_batches(batches, 1, next(base.parameters()).device)[0] if batches else None
    asked = [] if config.rule == CompressionConfig().rule else [config]
    by_tolerance = [_with_tolerance(config, tolerance) for tolerance in sorted({*tolerances})]
    configs = by_tolerance + [other for other in asked if other.rule not in {c.rule for c in by_tolerance}]
    observation, _ = calibrate(base, by_tolerance[0] if by_tolerance else config, batches)
    return _compare(base, configs, observation, batch, batches)


def check_whole(model: nn.Module) -> None:
    """Refuse a model that cannot be copied.

    Raises:
        UnsupportedSetupError: it is sharded.
    """
    if is_sharded(model):
        raise UnsupportedSetupError(
            "What several tolerances would do is found on copies of the model, and FSDP2 shards this one. Run "
            "`hf-compressm analyze` on a checkpoint of it, or leave `dry_run` out."
        )


def analyze_observed(
    model: nn.Module, config: CompressionConfig, observation: Observation, batch: Mapping[str, Any] | None
) -> Analysis:
    """The same for `TOLERANCES` in the middle of a run, from what the layers have seen; leaves all as it was.

    Args:
        model, config: as for `analyze`.
        observation: of the layers, stopped.
        batch: a training batch, to measure steps on.
    """
    configs = [_with_tolerance(config, tolerance) for tolerance in TOLERANCES]
    return _compare(extract_model_from_parallel(model), configs, observation, batch, None)


def _compare(
    model: nn.Module, configs: list[CompressionConfig], observation: Observation, batch, batches: list | None
) -> Analysis:
    candidates, now = [], StepCost(_parameters(model))
    original = copy.deepcopy(model)  # steps leave their marks: gradients, caches of kernels
    for config in tqdm(configs, desc="reducing copies", unit="rule", leave=False, disable=None):
        name, value = config.rule
        if name == "max_loss_increase":  # the loss belongs to a model, so that its copy needs one of its own
            reduced = copy.deepcopy(model)
            event = compress(reduced, config, batches).events[0]
        else:
            reduced, seen = copy.deepcopy((model, observation))
            event = compress_once(reduced, config, None, seen)
        step, speedup = StepCost(_parameters(reduced)), None
        if batch is not None:
            try:
                before, step = _step_costs([original, reduced], batch)
            except Exception as error:  # whatever a model says to a batch, the sizes are known
                logger.warning("No training step could be measured: %s: %s.", type(error).__name__, error)
                batch, now = None, StepCost(now.parameters)
                candidates = [replace(c, step=StepCost(c.step.parameters), speedup=None) for c in candidates]
            else:
                speedup = before.seconds / step.seconds
                now = before if now.seconds is None or before.seconds < now.seconds else now
        candidates.append(Candidate(f"{_SYMBOLS.get(name, name)}={value:g}", event, step, speedup))
    if now.seconds is not None:  # on a busy machine only steps that took turns can be compared
        candidates = [replace(c, step=replace(c.step, seconds=now.seconds / c.speedup)) for c in candidates]
    shape = None if batch is None else next((tuple(v.shape) for v in batch.values() if torch.is_tensor(v)), ())
    return Analysis(candidates, now, shape)


def _step_costs(models: list[nn.Module], batch: Mapping[str, Any]) -> list[StepCost]:
    """The costs of training steps of models, which take turns; no random number of the caller is drawn."""
    device = next(models[0].parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        activations = [_saved_bytes(model.train(), batch) for model in models]
        rounds = [[_timed_step(model, batch) for model in models] for _ in range(_REPEATS)]
    seconds = map(min, zip(*rounds, strict=True))
    return [StepCost(_parameters(m), t, a) for m, t, a in zip(models, seconds, activations, strict=True)]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _step(model: nn.Module, batch: Mapping[str, Any]) -> None:
    output = model(**batch)
    loss = getattr(output, "loss", None)
    loss = output.logits.float().square().mean() if loss is None else loss  # any loss costs about the same
    loss.backward()
    model.zero_grad()


def _timed_step(model: nn.Module, batch: Mapping[str, Any]) -> float:
    started = _now()
    _step(model, batch)
    return _now() - started


def _saved_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes of the tensors that autograd keeps from the forward to the backward pass, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _step(model, batch)
    return sum(saved.values())


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


_SYMBOLS = {"tolerance": "τ"}
_NO_RULE = dict.fromkeys(("max_loss_increase", "target_state_size", "reduction_fraction"))


def _with_tolerance(config: CompressionConfig, tolerance: float) -> CompressionConfig:
    return replace(config, **_NO_RULE, tolerance=tolerance, dry_run=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _aligned(rows: list[list[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right; short rows are titles."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for first, *others in (row or [""] for row in rows):
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=bool(others)))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)
