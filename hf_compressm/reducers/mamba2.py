"""Mamba-2 (SSD) layers, stock and reducible: selective, with a scalar state matrix per head."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mamba2Config, PreTrainedConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ..models.causal_conv import convolve_and_act
from ..models.mamba2.modeling_reducible_mamba2 import ReducibleMamba2Mixer
from ..mor import (
    Balancing,
    Spectrum,
    SSDSignals,
    apply_map,
    balance,
    balanced_maps,
    instantaneous_sums,
    promote,
    refined_maps,
    select_states,
    ssd_token_moments,
)
from ..ops import ssd_scan
from ..surgery import GradientMap, resize_parameter_
from .base import Reduction, StateReducer, register_reducer
from .observing import ObservingReducer, add_sums, linear, with_context

# States per forward pass that enter the Gramians. Beyond that only every second, third, ... time step does.
_STATES_PER_PASS = 2**26
_MOMENT_ELEMENTS = 2**23  # of the moments that a refinement keeps; beyond that not of all tokens
_SHRINKAGE = 0.5  # of the refinement; 0.1 was worse on held-out text


@dataclass(frozen=True)
class RowSelection(GradientMap):
    """A gradient map that keeps some entries along `dim`: `matrix` holds their indices, and none is ever formed."""

    def apply(self, tensors: list[Tensor], squared: bool = False) -> list[Tensor]:
        return [t.double().index_select(self.dim, self.matrix.to(t.device)) for t in tensors]

    def fill_silent(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors


@dataclass(frozen=True)
class _Layer:
    """A layer's scan for some inputs: what it reads, its decay rates, its outputs without the feedthrough, and the
    state after them."""

    signals: SSDSignals
    A: Tensor
    y: Tensor
    state: Tensor

    @cached_property
    def power(self) -> Tensor:
        """Weighted sum of the squared outputs of each group."""
        return self.group_sums(self.y)

    def group_sums(self, outputs: Tensor) -> Tensor:
        """Weighted sums of the squares of `outputs` (batch, L, H, P) over all but the groups, (G,) float64."""
        squares = (self.signals.weight * outputs.square()).sum((0, 1, 3))
        return promote(squares, torch.float64).unflatten(0, (self.signals.groups, -1)).sum(1)

    def errors(self, B_map: Tensor, C_map: Tensor) -> Tensor:
        """Weighted sums of the squared errors of each group, with these maps (G, r, n) of B and C."""
        s = self.signals
        y, _ = ssd_scan(s.x, s.dt, self.A, apply_map(B_map, s.B), apply_map(C_map, s.C), mask=s.mask)
        return self.group_sums(y - self.y)


def mamba2_layer(
    mixer: Mamba2Mixer,
    hidden: Tensor,
    mask: Tensor | None,
    counts: Tensor | None = None,
    context: int = 0,
    h0: Tensor | None = None,
) -> _Layer:
    """What the scan of a mixer does with the inputs `hidden` (batch, L, hidden_size), and the weight of its outputs.

    A squared error of an output is weighted with what follows it: gate, normalisation (by its present size) and the
    norm of the column of `out_proj`. The mask (batch, L) is False at padding; `counts` is False where outputs do not
    matter. The first `context` time steps feed the convolution only; the scan goes on from the state `h0`.
    """
    dtype = torch.promote_types(mixer.A_log.dtype, torch.float32)
    real = 1.0 if mask is None else mask[..., None]
    inner, groups = mixer.intermediate_size, mixer.n_groups
    projected = linear(mixer.in_proj, hidden.to(dtype) * real)
    gate, xBC, dt = projected.split([inner, mixer.conv_dim, mixer.num_heads], dim=-1)
    xBC = convolve_and_act(mixer, xBC) * real
    gate, xBC, dt = (part[:, context:] for part in (gate, xBC, dt))
    mask = None if mask is None else mask[:, context:]
    channels = (mixer.conv_dim - inner) // 2
    x, B, C = xBC.split([inner, channels, channels], dim=-1)
    B, C = (vectors.unflatten(-1, (groups, -1)) for vectors in (B, C))
    if getattr(mixer, "B_map", None) is not None:
        B, C = apply_map(mixer.B_map, B), apply_map(mixer.C_map, C)
    x = x.unflatten(-1, (mixer.num_heads, -1))
    dt = F.softplus(dt + mixer.dt_bias.to(dtype)).clamp(*mixer.time_step_limit)
    A = -torch.exp(mixer.A_log.to(dtype))
    y, state = ssd_scan(x, dt, A, B, C, h0, mask)
    weight = _output_weight(mixer, y, x, gate)
    if counts is not None:
        weight = weight * counts[..., None, None]
    return _Layer(SSDSignals(x, dt, B, C, weight, mask), A, y, state)


def _output_weight(mixer: Mamba2Mixer, y: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Squared gain (batch, L, H, P) from an output `y` of the scan to the output of the mixer.

    The normalisation counts by its present size; or by that of the scan's part, where scan and feedthrough nearly
    cancel: what changes the direction there can change it no more than once.
    """
    gain = F.silu(gate).unflatten(-1, y.shape[2:])
    whole, part = ((gain * f).flatten(2).square() for f in (y + mixer.D.to(y.dtype)[:, None] * x, y))
    sizes = [f.unflatten(-1, (-1, mixer.norm.group_size)).mean(-1, keepdim=True) for f in (whole, part)]
    size = torch.maximum(*sizes) + mixer.norm.variance_epsilon
    column = mixer.out_proj.weight.to(y.dtype).square().sum(0) * mixer.norm.weight.to(y.dtype).square()
    return gain.square() * (column.view(-1, mixer.norm.group_size) / size).view_as(y)


@register_reducer(Mamba2Mixer)
class Mamba2Reducer(ObservingReducer):
    """Selection of states of a Mamba-2 layer: the result is an ordinary layer, with as many states in each group.

    Stock layers know no other reduction, because B and C pass a convolution and a nonlinearity into which no change
    of basis folds.
    """

    methods = ("selection",)
    uniform = True
    state_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, module: Mamba2Mixer, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._balancings: list[Balancing] = []
        self._parts: tuple[_Layer, _Layer] | None = None

    def sync_config(self, config: PreTrainedConfig) -> None:
        """Write the state size into the model's config, to which a stock mixer has no reference."""
        if config.model_type == Mamba2Config.model_type:
            config.state_size = self.state_size

    def _accumulate(
        self, hidden: Tensor, mask: Tensor | None, spans: list[slice], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        elements = hidden.shape[0] * hidden.shape[1] * self.module.intermediate_size * self.state_size
        sums, state = {}, None
        for span in spans:
            part, part_mask, context = with_context(hidden, mask, span, self.module.conv_kernel_size)
            layer = mamba2_layer(self.module, part, part_mask, context=context, h0=state)
            found = instantaneous_sums(layer.signals, layer.A, math.ceil(elements / _STATES_PER_PASS), state)
            add_sums(sums, found)
            state = layer.state
        return sums

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        """The Hankel singular values of the layer; with several groups root sums of squares of theirs."""
        self._require_observation()
        self._balancings = [balance(*gramians) for gramians in zip(*self._gramians(), strict=True)]
        return Spectrum(self._hsv, self.state_size)

    @torch.no_grad()
    def reduce(self, states: int) -> Reduction:
        if self._parts is None:
            self._parts = tuple(mamba2_layer(self.module, *part) for part in self._fit_and_held_out())
        reduction = self._reduce(min(states, self.state_size))
        if not all(p.isfinite().all() for p in reduction.parameters.values()):
            raise ArithmeticError("The reduced weights are not finite.")
        return reduction

    def resize(self, states: int) -> None:
        m = self.module
        channels = 2 * m.n_groups * states
        m.ssm_state_size, m.conv_dim = states, m.intermediate_size + channels
        m.conv1d.in_channels = m.conv1d.out_channels = m.conv1d.groups = m.conv_dim
        m.in_proj.out_features = m.intermediate_size + m.conv_dim + m.num_heads
        for name, rows in (("in_proj", m.in_proj.out_features), ("conv1d", m.conv_dim)):
            for param in m.get_submodule(name).parameters():
                resize_parameter_(param, param.new_zeros(rows, *param.shape[1:]))

    def _gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q of each group, (G, n, n)."""
        sums = self._sums
        return sums["P"] / sums["states"].clamp_min(1), sums["Q"] / sums["tokens"].clamp_min(1)

    @staticmethod
    def stored_size(module: Mamba2Mixer, weights: dict[str, Tensor]) -> int | None:
        conv = weights.get("conv1d.weight")
        return None if conv is None else (len(conv) - module.intermediate_size) // (2 * module.n_groups)

    @property
    def _hsv(self) -> Tensor:
        return torch.stack([balancing.hsv for balancing in self._balancings]).square().sum(0).sqrt()

    def _reduce(self, states: int) -> Reduction:
        return self._select(states)

    def _select(self, states: int) -> Reduction:
        kept = torch.stack([select_states(M, states) for M in self._sums["M"]])
        rows = torch.eye(self.state_size, dtype=torch.float64, device=kept.device)[kept]
        parameters, maps = self._selected(kept)
        return self._reduction(states, parameters, maps, "selection", self._parts[1].errors(rows, rows))

    def _selected(self, kept: Tensor) -> tuple[dict[str, Tensor], list[GradientMap]]:
        """The layer with the states `kept` (G, r) of each group, and how its gradients change."""
        m, n = self.module, self.state_size
        first = torch.arange(m.n_groups, device=kept.device)[:, None] * n
        states = torch.cat([(first + kept).flatten(), (first + kept).flatten() + m.n_groups * n])
        inner = torch.arange(m.intermediate_size, device=kept.device)
        conv = torch.cat([inner, len(inner) + states])
        heads = torch.arange(m.num_heads, device=kept.device) + len(inner) + m.conv_dim
        indices = {"in_proj": torch.cat([inner, len(inner) + conv, heads]), "conv1d": conv}
        parameters, maps = {}, []
        for module, index in indices.items():
            for name, param in m.get_submodule(module).named_parameters(prefix=module):
                parameters[name] = param.detach().index_select(0, index.to(param.device))
                maps.append(RowSelection((name,), 0, index))
        return parameters, maps

    def _reduction(
        self, states: int, parameters: dict[str, Tensor], maps: list[GradientMap], method: str, errors: Tensor
    ) -> Reduction:
        power = float(self._parts[1].power.sum())
        hsv = self._hsv
        return Reduction(
            state_size=states,
            parameters=parameters,
            gradient_maps=maps,
            method=method,
            energy_discarded=float(hsv[states:].sum() / hsv.sum()),
            relative_error=math.sqrt(float(errors.sum()) / power) if power > 0 else 0.0,
        )


@register_reducer(ReducibleMamba2Mixer)
class ReducibleMamba2Reducer(Mamba2Reducer):
    """Balanced truncation, by two maps per group after convolution and nonlinearity; or selection, as in stock layers.

    Besides balancing, its refinement on a sample and selection are tried, and the least error on held-out inputs
    decides. A layer that has maps already gets the product of old and new ones.
    """

    methods = ("balanced", "selection")
    uniform = False
    added_parameters = ("B_map", "C_map")
    state_parameters = (*Mamba2Reducer.state_parameters, *added_parameters)
    stored_size = staticmethod(StateReducer.stored_size)
    _packed = False
    sync_config = StateReducer.sync_config

    def resize(self, states: int) -> None:
        self.module.resize_state(states)

    def observe(self, args: tuple, kwargs: dict) -> None:
        self._packed = self._packed or kwargs.get("seq_idx") is not None
        super().observe(args, kwargs)

    def spectrum(self) -> Spectrum:
        if self._packed and self.method == "balanced":
            raise ArithmeticError(
                "Expected one sequence per row; found packed ones (`seq_idx`), which the kernels that know them would "
                'not take through the maps of a balanced reduction. Use method="selection", or do not pack.'
            )
        return super().spectrum()

    def apply(self, reduction: Reduction) -> None:
        # a reduction without maps is one of the channels, or puts back a layer that had none
        mapped = "B_map" in reduction.parameters
        self.module._resize(reduction.state_size, self.module.conv_channels if mapped else None)
        for name, value in reduction.parameters.items():
            resize_parameter_(self.module.get_parameter(name), value)

    def _reduce(self, states: int) -> Reduction:
        return self._select(states) if self.method == "selection" else self._balance(states)

    def _balance(self, states: int) -> Reduction:
        """For each group the candidate with the least held-out error."""
        states = min(states, max(1, *(balancing.rank for balancing in self._balancings)))
        held_out = self._parts[1]
        best, least, methods = None, None, [""] * self.module.n_groups
        for method, B_map, C_map in self._candidates(states):
            errors = held_out.errors(B_map, C_map).nan_to_num(nan=math.inf)
            better = torch.ones_like(errors, dtype=torch.bool) if best is None else errors < least
            choice = better[:, None, None]
            best = (B_map, C_map) if best is None else tuple(map(torch.where, (choice,) * 2, (B_map, C_map), best))
            least = errors if least is None else torch.minimum(errors, least)
            methods = [method if new else old for new, old in zip(better.tolist(), methods, strict=True)]
        parameters, maps = self._mapped(*_equal_norms(*best))
        return self._reduction(states, parameters, maps, "+".join(sorted(set(methods))), least)

    def _candidates(self, states: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Names and maps (G, r, n) of B and C."""
        P, Q = self._gramians()
        kept = torch.stack([select_states(M, states) for M in self._sums["M"]])
        rows = torch.eye(self.state_size, dtype=P.dtype, device=P.device)[kept]
        yield "selection", rows, rows
        balanced = balanced_maps(self._balancings, states)
        yield "balanced", *balanced
        if states < self.state_size:
            groups = zip(*balanced, *self._moments, P, Q, strict=True)
            refined = [refined_maps(*group, _SHRINKAGE) for group in groups]
            yield "refined", *(torch.stack(maps) for maps in zip(*refined, strict=True))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        fit = self._parts[0]
        elements = fit.y.shape[0] * fit.y.shape[1] * self.module.n_groups * self.state_size**2
        return ssd_token_moments(fit.signals, fit.A, math.ceil(elements / _MOMENT_ELEMENTS))

    def _selected(self, kept: Tensor) -> tuple[dict[str, Tensor], list[GradientMap]]:
        if self.module.B_map is None:
            return super()._selected(kept)
        rows = torch.eye(self.state_size, dtype=torch.float64, device=kept.device)[kept]
        return self._mapped(rows, rows)

    def _mapped(self, B_map: Tensor, C_map: Tensor) -> tuple[dict[str, Tensor], list[GradientMap]]:
        """The layer with these maps after the ones it has, and how its gradients change."""
        m = self.module
        if m.B_map is None:
            return {"B_map": B_map, "C_map": C_map}, []
        old_B, old_C = (promote(map_, torch.float64).to(B_map.device) for map_ in (m.B_map, m.C_map))
        # gradients are dual to weights
        maps = [GradientMap(("B_map",), 1, C_map), GradientMap(("C_map",), 1, B_map)]
        return {"B_map": B_map @ old_B, "C_map": C_map @ old_C}, maps


def _equal_norms(B_map: Tensor, C_map: Tensor) -> tuple[Tensor, Tensor]:
    """The maps with the free scale of each state such that its rows for B and C have one norm."""
    norm_B, norm_C = (torch.linalg.vector_norm(map_, dim=2, keepdim=True) for map_ in (B_map, C_map))
    scale = torch.where((norm_B > 0) & (norm_C > 0), norm_C / norm_B, 1).sqrt()
    return B_map * scale, C_map / scale
