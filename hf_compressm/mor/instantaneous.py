r"""Reduction of a selective layer with a scalar state matrix per head (Mamba-2, SSD).

$$h_t[p] = \exp(\Delta_t A) h_{t-1}[p] + \Delta_t x_t[p] B_t, \qquad y_t[p] = C_t \cdot h_t[p]$$

for each head, with `B_t` and `C_t` shared by the heads of a group (Dao and Gu, *Transformers are SSMs*, arXiv
2405.21060, section 6). The state matrix is a multiple of the identity and commutes with every change of basis: states
that are kept evolve exactly, `W^T h` under the inputs `W^T B`, and a projection errs by `C_t . (I - V W^T) h_t`, now,
not later. So the observability weight is the instantaneous `Q = E[C C^T]`, and with `P = E[sum_p w h h^T]` balanced
truncation makes the mean square error `sum_{i>r} sigma_i^2` if C and h are independent, the least possible.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .balancing import Balancing
from .systems import float64_device, promote

_REFINEMENT_STEPS = 40
_SMALLEST_GAIN = 1e-12  # of a swap, relative: below it is rounding


@dataclass(frozen=True)
class SSDSignals:
    """What one scan reads and how much its outputs matter.

    Attributes:
        x: inputs (batch, L, H, P): heads and their channels.
        dt: time steps (batch, L, H), not negative.
        B, C: input and output vectors (batch, L, G, n); head h belongs to group h // (H / G).
        weight: of each squared output (batch, L, H, P), zero where an output does not count.
        mask: bool (batch, L) or None: False freezes the state there and counts nothing, as for padding.
    """

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    mask: Tensor | None = None

    def __post_init__(self):
        if self.mask is not None:
            object.__setattr__(self, "dt", self.dt * self.mask[..., None])
            object.__setattr__(self, "weight", self.weight * self.mask[..., None, None])

    @property
    def groups(self) -> int:
        return self.B.shape[2]


def ssd_states(
    signals: SSDSignals, A: Tensor, stride: int = 1, h0: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """States at every `stride`-th time step, and at the last.

    Args:
        signals: the layer's.
        A: (H,), negative.
        stride: how many steps to take at once.
        h0: (batch, H, P, n), the state before the first step; None is zero.

    Yields:
        The time, and the states then, (batch, G, channels of the group, n).
    """
    batch, length, heads, channels = signals.x.shape
    groups, n = signals.B.shape[2:]
    grouped = (batch, -1, groups, heads // groups, channels)
    A = A.to(signals.x)
    h = signals.x.new_zeros(batch, heads, channels, n) if h0 is None else h0.to(signals.x)
    h = h.unflatten(1, (groups, -1))
    for start in range(0, length, stride):
        span = slice(start, min(start + stride, length))
        exponents = signals.dt[:, span] * A
        after = exponents.flip(1).cumsum(1).flip(1)  # from before each step to the end of the span
        drive = (torch.exp(after - exponents) * signals.dt[:, span])[..., None] * signals.x[:, span]
        fresh = torch.einsum("btghp,btgn->bghpn", drive.reshape(grouped), signals.B[:, span])
        kept = torch.exp(after[:, 0]).view(batch, groups, -1, 1, 1)
        h = h * kept + fresh
        yield span.stop - 1, h.flatten(2, 3)


def instantaneous_sums(signals: SSDSignals, A: Tensor, stride: int = 1, h0: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over tokens from which the Gramians follow, float64; they add up over calls.

    Args:
        signals, A, stride, h0: as for `ssd_states`.

    Returns:
        "P": of `sum_p w h h^T` (G, n, n); "M": of `sum_p w (C * h)(C * h)^T` (G, n, n), whose quadratic form in the
        indicator of a set of states is the square error of leaving them out; "states": over how many tokens; "Q": of
        `C C^T` (G, n, n); "tokens": over how many tokens.
    """
    groups, n = signals.B.shape[2:]
    real = signals.mask if signals.mask is not None else torch.ones_like(signals.dt[..., 0], dtype=torch.bool)
    root = signals.weight.sqrt().unflatten(2, (groups, -1)).flatten(3)
    P = M = torch.zeros(groups, n, n, dtype=torch.float64, device=float64_device(signals.x.device))
    counted = 0
    for t, h in ssd_states(signals, A, stride, h0):
        weighted = h * root[:, t, ..., None]
        read = (weighted * signals.C[:, t, :, None]).transpose(0, 1).flatten(1, 2)
        weighted = weighted.transpose(0, 1).flatten(1, 2)
        P, M = (total + promote(f.mT @ f, torch.float64) for total, f in ((P, weighted), (M, read)))
        counted += int(real[:, t].sum())
    C = signals.C[real].transpose(0, 1)
    Q = promote(C.mT @ C, torch.float64)
    return {"P": P, "M": M, "states": Q.new_tensor(counted), "Q": Q, "tokens": Q.new_tensor(int(real.sum()))}


def select_states(M: Tensor, r: int) -> Tensor:
    """Indices of `r` states to keep, ascending, by backward elimination and swaps.

    Always the state goes whose loss, given those gone already, raises the square error the least. Then a kept state
    and one that is gone change places as long as that lowers it.

    Args:
        M: covariance of what the states put out (n, n), `E[w C_i C_j h_i h_j]`.
        r: 1 to n.
    """
    kept = torch.ones(len(M), dtype=torch.bool, device=M.device)
    coupling = torch.zeros_like(M[0])  # of each state with all that are gone
    for _ in range(len(M) - r):
        i = torch.where(kept, M.diagonal() + 2 * coupling, torch.inf).argmin()
        kept[i] = False
        coupling = coupling + M[i]
    for _ in range(len(M)):
        leave, come = M.diagonal() + 2 * coupling, M.diagonal() - 2 * coupling
        change = leave[:, None] + come - 2 * M
        change = torch.where(kept[:, None] & ~kept, change, torch.inf)
        i, j = divmod(int(change.argmin()), len(M))
        if not change[i, j] < -_SMALLEST_GAIN * M.trace():
            break
        kept[i], kept[j] = False, True
        coupling = coupling + M[i] - M[j]
    return kept.nonzero()[:, 0]


def balanced_maps(balancings: list[Balancing], r: int) -> tuple[Tensor, Tensor]:
    """Maps `W^T` and `V^T` (G, r, n) of the `r` leading balanced directions of each group.

    Rows beyond the numerical rank of a group are zero.
    """
    n = balancings[0].order
    maps = balancings[0].left.new_zeros(2, len(balancings), r, n)
    for group, balancing in enumerate(balancings):
        rank = min(r, balancing.rank)
        if rank:
            W, V = balancing.projection(rank)
            maps[0, group, :rank], maps[1, group, :rank] = W.mT, V.mT
    return maps[0], maps[1]


def ssd_token_moments(signals: SSDSignals, A: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
    """`C` (G, N, n) and `S = sum_p w h h^T` (G, N, n, n) of every `stride`-th token; float64."""
    root = signals.weight.sqrt().unflatten(2, (signals.groups, -1)).flatten(3)
    C, S = [], []
    for t, h in ssd_states(signals, A, stride):
        weighted = h * root[:, t, ..., None]
        C.append(promote(signals.C[:, t], torch.float64))
        S.append(promote(weighted.mT @ weighted, torch.float64))
    return torch.cat(C).transpose(0, 1), torch.cat(S).transpose(0, 1)


def refined_maps(
    B_map: Tensor, C_map: Tensor, C: Tensor, S: Tensor, P: Tensor, Q: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Minimise the square error of the output over both maps of one group by L-BFGS.

    A token's squared error is `e . S e` with `e = C - B_map^T C_map C`. Balancing minimises its mean for independent C
    and h; here they are what they are on a sample of tokens, of which there are few: the objective is shrunk towards
    that of balancing.

    Args:
        B_map, C_map: where to start (r, n).
        C, S: of the sample, (N, n) and (N, n, n).
        P, Q: Gramians (n, n).
        shrinkage: weight of the objective of balancing, 0 to 1.
    """
    scale = P.diagonal().clamp_min(torch.finfo(P.dtype).eps * P.diagonal().max()).sqrt()
    C, S, P, Q = C * scale, S / scale[:, None] / scale, P / scale[:, None] / scale, Q * scale[:, None] * scale
    W, M = (B_map * scale).requires_grad_(), (C_map / scale).requires_grad_()
    power = torch.einsum("tn,tnm,tm->", C, S, C), (P * Q).sum()
    optimizer = torch.optim.LBFGS([W, M], max_iter=_REFINEMENT_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        e = C - C @ M.mT @ W
        sample = (e * (S @ e[..., None])[..., 0]).sum() / power[0]
        rest = torch.eye(len(P), dtype=P.dtype, device=P.device) - W.mT @ M
        total = (1 - shrinkage) * sample + shrinkage * ((P @ rest) * (rest @ Q)).sum() / power[1]
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return W.detach() / scale, M.detach() * scale


def apply_map(map_: Tensor, vectors: Tensor) -> Tensor:
    """The map (G, r, n) of each group on its vectors (batch, L, G, n)."""
    return torch.einsum("grn,blgn->blgr", map_.to(vectors), vectors)
