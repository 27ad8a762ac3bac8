"""Mamba (S6) layers, stock and reducible: selective, with a diagonal state matrix per channel."""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mamba.modeling_mamba import MambaMixer

from ..models.causal_conv import convolve_and_act
from ..models.mamba.modeling_reducible_mamba import ReducibleMambaMixer
from ..mor import (
    Balancing,
    SelectiveCalibration,
    SelectiveReduction,
    SelectiveSignals,
    Spectrum,
    adjoint_gramian,
    balance,
    promote,
    reduce_selective,
    state_gramian,
)
from ..surgery import GradientMap, resize_parameter_
from .base import Reduction, StateReducer, register_reducer
from .observing import ObservingReducer, linear, with_context

# States per forward pass that enter the Gramians. Beyond that a share of the channels does, others in the next pass.
_STATES_PER_PASS = 2**26


def mamba_signals(
    mixer: MambaMixer, hidden: Tensor, mask: Tensor | None, counts: Tensor | None = None, context: int = 0
) -> SelectiveSignals:
    """What the scan of a mixer reads for the inputs `hidden` (batch, L, hidden_size), and the weight of its outputs.

    A squared error of an output is weighted with what follows it: the gate's square and the norm of the column of
    `out_proj`. The mask (batch, L) is False at padding; `counts` is False where outputs do not matter. The first
    `context` time steps feed the convolution only.
    """
    dtype = torch.promote_types(mixer.A_log.dtype, torch.float32)
    real = 1.0 if mask is None else mask[..., None]
    u, gate = linear(mixer.in_proj, hidden.to(dtype) * real).chunk(2, dim=-1)
    u = convolve_and_act(mixer, u) * real
    u, gate, mask = u[:, context:], gate[:, context:], None if mask is None else mask[:, context:]
    n = mixer.ssm_state_size
    step, B, C = linear(mixer.x_proj, u).split([mixer.time_step_rank, n, n], dim=-1)
    weight = F.silu(gate).square() * mixer.out_proj.weight.to(dtype).square().sum(0)
    if counts is not None:
        weight = weight * counts[..., None]
    return SelectiveSignals(u, F.softplus(linear(mixer.dt_proj, step)), B, C, weight, mask)


@register_reducer(MambaMixer)
class MambaReducer(ObservingReducer):
    """Balanced truncation of a Mamba layer with input-averaged Gramians.

    "balanced" tries several projections, selection among them, and keeps the one with the least output error on
    held-out inputs; "selection" keeps states as they are, and lets C make up for the others. Both are folded exactly
    into `x_proj` and `A_log`: the result is an ordinary Mamba layer.
    """

    methods = ("balanced", "selection")
    uniform = True
    state_parameters = ("A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")

    def __init__(self, module: MambaMixer, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._balancing: Balancing | None = None
        self._calibration: SelectiveCalibration | None = None

    def _accumulate(
        self, hidden: Tensor, mask: Tensor | None, spans: list[slice], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        A = -torch.exp(self.module.A_log.to(torch.promote_types(self.module.A_log.dtype, torch.float32)))
        step = math.ceil(hidden.shape[0] * hidden.shape[1] * A.numel() / _STATES_PER_PASS)
        first = self._passes % step

        @lru_cache(maxsize=1)  # the last span forwards is the first one backwards
        def signals(index: int) -> SelectiveSignals:
            part, part_mask, context = with_context(hidden, mask, spans[index], self.module.conv_kernel_size)
            return mamba_signals(self.module, part, part_mask, context=context).channels(first, step)

        A = A[first::step]
        P = state_gramian(map(signals, range(len(spans))), A)
        Q = adjoint_gramian(map(signals, reversed(range(len(spans)))), A, generators)
        tokens = hidden.shape[0] * hidden.shape[1] if mask is None else int(mask.sum())
        return {"P": P, "Q": Q, "terms": P.new_tensor(tokens * len(A))}

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        self._require_observation()
        self._balancing = balance(*self._gramians())
        return Spectrum(self._balancing.hsv, self.state_size)

    @torch.no_grad()
    def reduce(self, states: int) -> Reduction:
        if self._calibration is None:
            A = -torch.exp(promote(self.module.A_log, torch.float64))
            fit, held_out = (mamba_signals(self.module, *part) for part in self._fit_and_held_out())
            self._calibration = SelectiveCalibration(A, fit, held_out)
        P, Q = self._gramians()
        found = reduce_selective(P, Q, self._balancing, self._calibration, states, self.method)
        parameters, gradient_map = self._weights(found)
        if not all(p.isfinite().all() for p in parameters.values()):
            raise ArithmeticError("The reduced weights are not finite.")
        hsv = self._balancing.hsv
        return Reduction(
            state_size=found.order,
            parameters=parameters,
            gradient_maps=[gradient_map],
            method=found.method,
            energy_discarded=float(hsv[found.order :].sum() / hsv.sum()),
            relative_error=found.relative_error,
        )

    def resize(self, states: int) -> None:
        m = self.module
        m.ssm_state_size = m.config.state_size = states
        m.x_proj.out_features = m.time_step_rank + 2 * states
        resize_parameter_(m.x_proj.weight, m.x_proj.weight.new_zeros(m.x_proj.out_features, m.intermediate_size))
        resize_parameter_(m.A_log, m.A_log.new_zeros(m.intermediate_size, states))

    @staticmethod
    def stored_size(module: MambaMixer, weights: dict[str, Tensor]) -> int | None:
        return weights["A_log"].shape[1] if "A_log" in weights else None

    def _gramians(self) -> tuple[Tensor, Tensor]:
        terms = self._sums["terms"].clamp_min(1)
        return self._sums["P"] / terms, self._sums["Q"] / terms

    def _weights(self, found: SelectiveReduction) -> tuple[dict[str, Tensor], GradientMap]:
        """`x_proj` and `A_log` of the reduction, scaled so that the rows of each state for B and C have one norm."""
        x_proj = promote(self.module.x_proj.weight, torch.float64)
        n = self.state_size
        _, rows_B, rows_C = x_proj.split([self.module.time_step_rank, n, n])
        W, M = found.W.to(x_proj.device), found.M.to(x_proj.device)
        norm_B, norm_C = (torch.linalg.vector_norm(rows, dim=1) for rows in (W.mT @ rows_B, M @ rows_C))
        scale = torch.where((norm_B > 0) & (norm_C > 0), norm_C / norm_B, 1).sqrt()
        W, M = W * scale, M / scale[:, None]
        steps = torch.eye(self.module.time_step_rank, dtype=x_proj.dtype, device=x_proj.device)
        fold = torch.block_diag(steps, W.mT, M)
        # A change of B' moves the states by M^T, as the output sees them, and a change of C' reads them through W^T:
        # gradients of B follow M, and those of C follow W^T.
        dual = torch.block_diag(steps, M, W.mT)
        parameters = {"x_proj.weight": fold @ x_proj, "A_log": torch.log(-found.A)}
        return parameters, GradientMap(("x_proj.weight",), 0, dual)


@register_reducer(ReducibleMambaMixer)
class ReducibleMambaReducer(MambaReducer):
    """The same for layers that may differ in their state sizes."""

    uniform = False
    stored_size = staticmethod(StateReducer.stored_size)

    def resize(self, states: int) -> None:
        self.module.resize_state(states)
