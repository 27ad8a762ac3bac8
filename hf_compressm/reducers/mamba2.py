"""Mamba-2 (SSD) layers, stock and reducible: selective, with a scalar state matrix per head."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from ..models.mamba2.modeling_reducible_mamba2 import ReducibleMamba2Mixer
from ..mor import (
    Balancing,
    Spectrum,
    SSDSignals,
    apply_map,
    balance,
    balanced_maps,
    centred_refit,
    instantaneous_sums,
    promote,
    select_states,
    ssd_token_moments,
)
from ..ops import ssd_scan
from ..surgery import GradientMap, resize_parameter_
from .base import Reduction, register_reducer
from .observing import ObservingReducer, causal_convolution, linear

# States per forward pass that enter the Gramians. Beyond that only every second, third, ... time step does.
_STATES_PER_PASS = 2**26
_FIT_STRIDE = 4  # every how many tokens a refit looks at: neighbours say much the same
_RIDGES = [10.0, 1.0, 0.1]


@dataclass(frozen=True)
class RowSelection(GradientMap):
    """A gradient map that keeps some entries along `dim`: `matrix` holds their indices, and none is ever formed."""

    def apply(self, tensors: list[Tensor], squared: bool = False) -> list[Tensor]:
        return [t.double().index_select(self.dim, self.matrix.to(t.device)) for t in tensors]

    def fill_silent(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors


@dataclass(frozen=True)
class _Layer:
    """A layer's scan for some inputs: what it reads, its decay rates and its outputs without the feedthrough."""

    signals: SSDSignals
    A: Tensor
    y: Tensor

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


def mamba2_layer(mixer: Mamba2Mixer, hidden: Tensor, mask: Tensor | None, counts: Tensor | None = None) -> _Layer:
    """What the scan of a mixer does with the inputs `hidden` (batch, L, hidden_size), and the weight of its outputs.

    A squared error of an output is weighted with what follows it: gate, normalisation (by its present size) and the
    norm of the column of `out_proj`. The mask (batch, L) is False at padding; `counts` is False where outputs do not
    matter.
    """
    dtype = torch.promote_types(mixer.A_log.dtype, torch.float32)
    real = 1.0 if mask is None else mask[..., None]
    inner, groups = mixer.intermediate_size, mixer.n_groups
    projected = linear(mixer.in_proj, hidden.to(dtype) * real)
    gate, xBC, dt = projected.split([inner, mixer.conv_dim, mixer.num_heads], dim=-1)
    xBC = mixer.act(causal_convolution(mixer.conv1d, xBC)) * real
    channels = (mixer.conv_dim - inner) // 2
    x, B, C = xBC.split([inner, channels, channels], dim=-1)
    B, C = (vectors.unflatten(-1, (groups, -1)) for vectors in (B, C))
    if getattr(mixer, "B_map", None) is not None:
        B, C = apply_map(mixer.B_map, B), apply_map(mixer.C_map, C)
    x = x.unflatten(-1, (mixer.num_heads, -1))
    dt = F.softplus(dt + mixer.dt_bias.to(dtype)).clamp(*mixer.time_step_limit)
    A = -torch.exp(mixer.A_log.to(dtype))
    y, _ = ssd_scan(x, dt, A, B, C, mask=mask)
    weight = _output_weight(mixer, y + mixer.D.to(dtype)[:, None] * x, gate)
    if counts is not None:
        weight = weight * counts[..., None, None]
    return _Layer(SSDSignals(x, dt, B, C, weight, mask), A, y)


def _output_weight(mixer: Mamba2Mixer, y: Tensor, gate: Tensor) -> Tensor:
    """Squared gain from an output `y` (batch, L, H, P) of the scan to the output of the mixer."""
    gain = F.silu(gate)
    gated = (y.flatten(2) * gain).unflatten(-1, (-1, mixer.norm.group_size))
    size = gated.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon
    column = mixer.out_proj.weight.to(y.dtype).square().sum(0) * mixer.norm.weight.to(y.dtype).square()
    weight = gain.square() * column / size.expand_as(gated).flatten(2)
    return weight.unflatten(-1, (mixer.num_heads, -1))


@register_reducer(Mamba2Mixer)
class Mamba2Reducer(ObservingReducer):
    """Selection of states of a Mamba-2 layer: the result is an ordinary layer, with as many states in each group.

    Stock layers know no other reduction, because B and C pass a convolution and a nonlinearity into which no change
    of basis folds.
    """

    methods = ("selection",)
    uniform = True

    def __init__(self, module: Mamba2Mixer, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._balancings: list[Balancing] = []
        self._parts: tuple[_Layer, _Layer] | None = None

    def sync_config(self, config: PreTrainedConfig) -> None:
        """Write the state size into the model's config, to which a stock mixer has no reference."""
        config.state_size = self.state_size

    def _accumulate(self, hidden: Tensor, mask: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        layer = mamba2_layer(self.module, hidden, mask)
        elements = hidden.shape[0] * hidden.shape[1] * self.module.intermediate_size * self.state_size
        return instantaneous_sums(layer.signals, layer.A, stride=math.ceil(elements / _STATES_PER_PASS))

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        """The Hankel singular values of the layer; with several groups root sums of squares of theirs."""
        self._require_observation()
        sums = self._sums
        P, Q = sums["P"] / sums["states"].clamp_min(1), sums["Q"] / sums["tokens"].clamp_min(1)
        self._balancings = [balance(*gramians) for gramians in zip(P, Q, strict=True)]
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
                parameters[name] = param.detach().index_select(0, index)
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

    The map of C is refitted by least squares of the output where that helps on held-out inputs. A layer that has maps
    already gets the product of old and new ones.
    """

    methods = ("balanced", "selection")
    uniform = False

    def resize(self, states: int) -> None:
        self.module.resize_state(states)

    def apply(self, reduction: Reduction) -> None:
        # a reduction without maps is one of the channels, or puts back a layer that had none
        mapped = "B_map" in reduction.parameters
        self.module._resize(reduction.state_size, self.module.conv_channels if mapped else None)
        for name, value in reduction.parameters.items():
            resize_parameter_(self.module.get_parameter(name), value)

    def _reduce(self, states: int) -> Reduction:
        return self._select(states) if self.method == "selection" else self._balance(states)

    def _balance(self, states: int) -> Reduction:
        states = min(states, max(1, *(balancing.rank for balancing in self._balancings)))
        B_map, C_map = balanced_maps(self._balancings, states)
        C_map, errors = self._refit(B_map, C_map)
        parameters, maps = self._mapped(B_map, C_map)
        return self._reduction(states, parameters, maps, "balanced", errors)

    def _refit(self, B_map: Tensor, C_map: Tensor) -> tuple[Tensor, Tensor]:
        """The map of C with the least held-out error for each group, as it is or refitted, and these errors."""
        fit, held_out = self._parts
        moments = ssd_token_moments(fit.signals, fit.y, fit.A, B_map, _FIT_STRIDE)
        refits = [centred_refit(*group, _RIDGES) for group in zip(moments, C_map, strict=True)]
        tries = [C_map, *(torch.stack(maps) for maps in zip(*refits, strict=True))]
        errors = torch.stack([held_out.errors(B_map, each) for each in tries])
        best = errors.nan_to_num(nan=math.inf).argmin(0)
        chosen = torch.stack([tries[k][group] for group, k in enumerate(best.tolist())])
        return chosen, errors.amin(0)

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
        # gradients are dual to weights; a map of its own for each group is beyond a gradient map of one dimension
        maps = [GradientMap(("B_map",), 1, C_map[0]), GradientMap(("C_map",), 1, B_map[0])]
        return {"B_map": B_map @ old_B, "C_map": C_map @ old_C}, maps if m.n_groups == 1 else []
