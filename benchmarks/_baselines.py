"""Other ways to choose what a selective layer keeps: scores of its states from the literature, and an LTI surrogate.

Each score is a number per state, the larger the more important, with the formula of its source. The sources of all but
GHOST know only time-invariant layers: where theirs has a constant, the root mean square over the calibration data
stands here. All layers keep the same number of states, so that scores are compared within a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compressm.mor import Balancing, SelectiveReduction, balance, balanced_maps, ssd_states
from hf_compressm.mor.selective import rotated_balanced, scan_chunks
from hf_compressm.reducers import Reduction, StateReducer
from hf_compressm.reducers.mamba import MambaReducer, mamba_signals
from hf_compressm.reducers.mamba2 import mamba2_layer


@dataclass(frozen=True)
class LayerStatistics:
    """Averages of a layer over the calibration tokens and, where they have any, over the channels; float64.

    Attributes:
        h2, B2, C2: mean squares of the states, of B and of C, (n,).
        y2: mean square of what each state puts out, `E[(C_i h_i)^2]`, (n,).
        B, C: means (n,).
        decay: `exp(mean step * A)`, (channels or heads, n) or, where A is a scalar, (heads, 1).
        step: mean time step (channels or heads,).
        weights: norms of the rows of the weights that make B and C, (n,).
    """

    h2: Tensor
    B2: Tensor
    C2: Tensor
    y2: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor
    step: Tensor
    weights: Tensor


@torch.no_grad()
def mamba_statistics(mixer: nn.Module, hidden: Tensor) -> LayerStatistics:
    """Of a Mamba layer for its inputs `hidden` (batch, L, hidden_size)."""
    s = mamba_signals(mixer, hidden, None).time_major
    A = -torch.exp(mixer.A_log.detach())
    h2 = y2 = torch.zeros(A.shape[1], dtype=torch.float64)
    for span, states in scan_chunks(s.delta, s.delta * s.u, s.B, A):
        h2 = h2 + states.square().sum((0, 1, 2)).double()
        y2 = y2 + (states * s.C[span, :, None]).square().sum((0, 1, 2)).double()
    step = s.delta.double().mean((0, 1))
    rows = mixer.x_proj.weight.detach().double()[mixer.time_step_rank :].unflatten(0, (2, -1))
    return LayerStatistics(
        h2 / s.u.numel(),
        *(part.double().square().mean((0, 1)) for part in (s.B, s.C)),
        y2 / s.u.numel(),
        *(part.double().mean((0, 1)) for part in (s.B, s.C)),
        torch.exp(step[:, None] * A.double()),
        step,
        rows.square().sum((0, 2)).sqrt(),
    )


@torch.no_grad()
def mamba2_statistics(mixer: nn.Module, hidden: Tensor) -> LayerStatistics:
    """Of a Mamba-2 layer with one group for its inputs `hidden` (batch, L, hidden_size)."""
    layer = mamba2_layer(mixer, hidden, None)
    s, n = layer.signals, mixer.ssm_state_size
    h2 = y2 = torch.zeros(n, dtype=torch.float64)
    times = 0
    for t, h in ssd_states(s, layer.A, stride=4):
        h2 = h2 + h.square().mean((0, 1, 2)).double()
        y2 = y2 + (h * s.C[:, t, :, None]).square().mean((0, 1, 2)).double()
        times += 1
    step = s.dt.double().mean((0, 1))
    rows = mixer.in_proj.weight.detach().double()[2 * mixer.intermediate_size :][: 2 * n].unflatten(0, (2, n))
    return LayerStatistics(
        h2 / times,
        *(part.double().square().mean((0, 1, 2)) for part in (s.B, s.C)),
        y2 / times,
        *(part.double().mean((0, 1, 2)) for part in (s.B, s.C)),
        torch.exp(step * layer.A.double())[:, None],
        step,
        rows.square().sum((0, 2)).sqrt(),
    )


def magnitude(s: LayerStatistics) -> Tensor:
    """Norm of the state's weights, as in structured magnitude pruning (Li et al., ICLR 2017, for filters)."""
    return s.weights


def ghost(s: LayerStatistics) -> Tensor:
    """`E[h_i^2] E[C_i^2]` (Menezes and Kyrillidis, *GHOST*, arXiv 2602.11408)."""
    return s.h2 * s.C2


def aire(s: LayerStatistics) -> Tensor:
    """Energy of the impulse response, `|C_i|^2 |B_i|^2 / (1 - |lambda_i|^2)` (Padhy et al., *AIRE-Prune*,
    arXiv 2602.00534), averaged over the channels."""
    return s.C2 * s.B2 * (s.step[:, None].square() / (1 - s.decay.square())).mean(0)


def last(s: LayerStatistics) -> Tensor:
    """H-infinity norm, `|C_i| |B_i| / (1 - |lambda_i|)` (Gwak et al., *Layer-Adaptive State Pruning*, NeurIPS 2024,
    arXiv 2411.02824), averaged over the channels."""
    return (s.C2 * s.B2).sqrt() * (s.step[:, None] / (1 - s.decay)).mean(0)


def output_energy(s: LayerStatistics) -> Tensor:
    """Energy that the state does put out on the calibration data, `E[(C_i h_i)^2]`."""
    return s.y2


SCORES = {"magnitude": magnitude, "GHOST": ghost, "AIRE": aire, "LAST": last, "output energy": output_energy}


def lti_surrogate(s: LayerStatistics) -> Balancing:
    """Balancing of the time-invariant layer with the mean time steps, B and C (as CompreSSM, arXiv 2510.02823, treats
    Mamba), its Gramians averaged over the channels."""
    n = len(s.B)
    decay = s.decay.expand(-1, n)
    sums = 1 / (1 - decay[:, :, None] * decay[:, None])
    P = (s.step[:, None, None].square() * sums).mean(0) * torch.outer(s.B, s.B)
    Q = sums.mean(0) * torch.outer(s.C, s.C)
    return balance(P, Q)


def select(reducer: StateReducer, kept: Tensor) -> Reduction:
    """The layer with the states `kept` (r,), nothing else changed."""
    kept = kept.sort().values
    if isinstance(reducer, MambaReducer):
        A = -torch.exp(reducer.module.A_log.detach().double())
        rows = torch.eye(A.shape[1], dtype=A.dtype)[kept]
        parameters, _ = reducer._weights(SelectiveReduction(rows.mT, rows, A[:, kept], "selection"))
    else:
        parameters, _ = reducer._selected(kept[None])
    return Reduction(len(kept), parameters, [], "selection", 0.0)


def truncate_surrogate(reducer: StateReducer, balancing: Balancing, states: int) -> Reduction:
    """The layer projected by the bases of its LTI surrogate, on `states` states or as many as these are good for."""
    states = min(states, balancing.rank)
    if isinstance(reducer, MambaReducer):
        A = -torch.exp(reducer.module.A_log.detach().double())
        parameters, _ = reducer._weights(rotated_balanced(balancing, A, states))
    else:
        parameters, _ = reducer._mapped(*balanced_maps([balancing], states))
    return Reduction(states, parameters, [], "LTI surrogate", 0.0)
