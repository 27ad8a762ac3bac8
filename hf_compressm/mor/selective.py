r"""Balanced truncation of a selective layer with a diagonal state matrix per channel (Mamba, S6).

$$h_t[d] = \exp(\Delta_t[d] A[d]) h_{t-1}[d] + \Delta_t[d] u_t[d] B_t, \qquad y_t[d] = C_t \cdot h_t[d]$$

(Gu and Dao, *Mamba*, arXiv 2312.00752, section 3). `B_t` and `C_t` are shared by the channels, and so are the bases of
the reduction: `B_t -> W^T B_t` and `C_t -> M C_t`, with a new diagonal per channel. The layer is time-varying, hence
the Gramians are averages over the input (Verriest and Kailath, *On generalized balanced realizations*, IEEE TAC 1983,
for the time-varying Gramians; Lall, Marsden and Glavaski, *A subspace approach to balanced truncation for model
reduction of nonlinear control systems*, 2002, for the averages).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .balancing import Balancing
from .refit import TokenMoments, centred_refit
from .systems import IllConditioned, float64_device, promote

_CHUNK_ELEMENTS = 2**21  # of states held at once
_MOMENT_ELEMENTS = 2**22  # of the moments that a refit keeps; beyond that not of all tokens
_SLOWEST = 0.1  # a channel's new modes are at most this much slower than its slowest old one
_SHIFT = 1e-10  # relative, of covariances that are inverted
_DELAYS = 2**13  # sampled over all channels, if there are not more channels
_DELAY_SAMPLES = 3  # of every lag, at most
_REFINEMENT_STEPS = 60
_RIDGES = [10.0, 1.0, 0.1]  # of the refits that compete, with none at all


@dataclass(frozen=True)
class SelectiveSignals:
    """What one selective scan reads and how much its outputs matter.

    Attributes:
        u: inputs (batch, L, D).
        delta: time steps (batch, L, D), positive.
        B, C: input and output vectors (batch, L, n).
        weight: of each squared output (batch, L, D), zero where an output does not count.
        mask: bool (batch, L) or None: False freezes the state there and counts nothing, as for padding.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    weight: Tensor
    mask: Tensor | None = None

    def __post_init__(self):
        if self.mask is not None:
            for name in ("delta", "weight"):
                object.__setattr__(self, name, getattr(self, name) * self.mask[..., None])

    @property
    def tokens(self) -> int:
        return self.u.shape[0] * self.u.shape[1] if self.mask is None else int(self.mask.sum())

    @property
    def time_major(self) -> "SelectiveSignals":
        """The same with (L, batch, ...) instead of (batch, L, ...)."""
        parts = (self.u, self.delta, self.B, self.C, self.weight)
        mask = None if self.mask is None else self.mask.mT
        return SelectiveSignals(*(part.transpose(0, 1).contiguous() for part in parts), mask)

    def channels(self, first: int, step: int) -> "SelectiveSignals":
        """Every `step`-th channel from `first` on."""
        u, delta, weight = (part[..., first::step] for part in (self.u, self.delta, self.weight))
        return SelectiveSignals(u, delta, self.B, self.C, weight, self.mask)


def scan_chunks(
    delta: Tensor, drive: Tensor, direction: Tensor, A: Tensor, h0: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """States of `h_t = exp(delta_t A) h_{t-1} + drive_t direction_t` in chunks of time.

    Args:
        delta, drive: (L, batch, D).
        direction: (L, batch, n).
        A: (D, n).
        h0: (batch, D, n), the state before the first step; None is zero.

    Yields:
        The slice of time, and the states there (steps, batch, D, n), in memory that the next chunk uses again.
    """
    length, batch, channels = delta.shape
    steps = max(1, min(length, _CHUNK_ELEMENTS // max(1, batch * A.numel())))
    states, decays = (delta.new_empty(steps, batch, channels, A.shape[1]) for _ in range(2))
    carried = delta.new_zeros(batch, channels, A.shape[1]) if h0 is None else h0
    A = A.to(delta) * math.log2(math.e)  # the exponential to base 2 is the faster one
    for start in range(0, length, steps):
        span = slice(start, min(start + steps, length))
        decay, state = decays[: span.stop - start], states[: span.stop - start]
        torch.mul(delta[span, :, :, None], A, out=decay).exp2_()
        torch.mul(drive[span, :, :, None], direction[span, :, None], out=state)
        previous = carried
        for now, factor in zip(state, decay, strict=True):
            previous = now.addcmul_(factor, previous)
        carried = previous.clone()
        yield span, state


def state_gramian(pieces: Iterable[SelectiveSignals], A: Tensor) -> Tensor:
    """Sum of `h h^T` over the counted tokens and the channels: (n, n), float64.

    Divided by the number of terms it is the controllability Gramian of the layer under its actual inputs.

    Args:
        pieces: the signals of consecutive spans of time, each needed only while it is at hand.
        A: (D, n).
    """
    total, state = _zero_gramian(A), None
    for signals in pieces:
        s = signals.time_major
        part, state = _outer_sum(s.delta, s.delta * s.u, s.B, A, s.mask, state)
        total += part
    return total


def adjoint_gramian(pieces: Iterable[SelectiveSignals], A: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Sum of `l l^T` over the counted tokens and the channels, an unbiased estimate: (n, n), float64.

    `l_t = C_t sqrt(w_t) xi_t + exp(delta_{t+1} A) l_{t+1}` with independent `xi = +-1`, so that the mean of
    `l_t l_t^T` is the channel's observability Gramian
    `Q_t = w_t C_t C_t^T + exp(delta_{t+1} A) Q_{t+1} exp(delta_{t+1} A)`.

    Args:
        pieces: as for `state_gramian`, but the last span first.
        A: (D, n).
        generators: of the signs of each sequence, on the CPU.
    """
    total, state, after = _zero_gramian(A), None, None
    for signals in pieces:
        s = signals.time_major
        size = (s.u.shape[0], s.u.shape[2])
        signs = torch.stack([torch.randint(0, 2, size, generator=g, dtype=torch.int8) for g in generators], dim=1)
        signs = signs.to(s.u.device) * 2 - 1
        drive = (s.weight.sqrt() * signs).flip(0)
        # from time t the adjoint goes to t - 1 with the decay of time t: reversed, the time steps lag by one
        after = torch.zeros_like(s.delta[:1]) if after is None else after
        delta = torch.cat([after, s.delta.flip(0)[:-1]])
        after = s.delta[:1]
        part, state = _outer_sum(delta, drive, s.C.flip(0), A, None if s.mask is None else s.mask.flip(0), state)
        total += part
    return total


def _zero_gramian(A: Tensor) -> Tensor:
    return torch.zeros(A.shape[1], A.shape[1], dtype=torch.float64, device=float64_device(A.device))


def _outer_sum(
    delta: Tensor, drive: Tensor, direction: Tensor, A: Tensor, mask: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sum of the outer products of the states after `state`, and the last of these."""
    total = _zero_gramian(A)
    for span, states in scan_chunks(delta, drive, direction, A, state):
        counted = states.flatten(0, 2) if mask is None else states[mask[span]].flatten(0, 1)
        total += promote(counted.mT @ counted, torch.float64)
        state = states[-1].clone()
    return total, state


def outputs(signals: SelectiveSignals, A: Tensor) -> Tensor:
    """Outputs `y` (batch, L, D) of the layer."""
    s = signals.time_major
    y = torch.empty_like(s.u)
    for span, states in scan_chunks(s.delta, s.delta * s.u, s.B, A):
        y[span] = (states @ s.C[span, ..., None])[..., 0]
    return y.transpose(0, 1)


@dataclass(frozen=True)
class SelectiveReduction:
    """A reduction of a selective layer to `r` states.

    Attributes:
        W: `B_t -> W^T B_t`, (n, r), float64.
        M: `C_t -> M C_t`, (r, n), float64.
        A: the new diagonals (D, r), negative, float64.
        method: the candidate's name.
        relative_error: root mean square error of the weighted outputs relative to their own, on inputs held out.
        errors: the same for every candidate that was tried.
    """

    W: Tensor
    M: Tensor
    A: Tensor
    method: str
    relative_error: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def order(self) -> int:
        return self.W.shape[1]


def rotated_balanced(balancing: Balancing, A: Tensor, r: int) -> SelectiveReduction:
    """Balanced coordinates, rotated into the real eigenbasis of the reduced channel mean of A.

    The new diagonals are `(W^T diag(A[d]) V)_ii`: what the rotation leaves off the diagonals is lost.

    Raises:
        ValueError: `r` is above the numerical rank of the Gramians.
    """
    W, V = balancing.projection(r)
    basis = _real_eigenbasis(W.mT @ (A.mean(0)[:, None] * V))
    W, V = W @ torch.linalg.inv(basis).mT, V @ basis
    return SelectiveReduction(W, V.mT, _stable(A @ (W * V), A), "balanced")


def symmetric_modes(P: Tensor, Q: Tensor, A: Tensor, r: int) -> SelectiveReduction:
    """Orthonormal projection in the coordinates that balance the diagonals of the Gramians, rotated to real modes.

    With `D = (Q_ii / P_ii)^(1/4)` the subspace is that of the `r` leading eigenvectors of the sum of the normalised
    `D P D` and `D^-1 Q D^-1`. The new diagonals are convex combinations of the old.
    """
    floor = torch.finfo(P.dtype).eps
    p, q = (gramian.diagonal().clamp_min(floor * gramian.diagonal().max()) for gramian in (P, Q))
    scale = (q / p) ** 0.25
    scaled_P, scaled_Q = scale[:, None] * P * scale, Q / scale[:, None] / scale
    _, vectors = torch.linalg.eigh(scaled_P / scaled_P.trace() + scaled_Q / scaled_Q.trace())
    leading = vectors[:, -r:]
    _, rotation = torch.linalg.eigh(leading.mT @ (A.mean(0)[:, None] * leading))
    leading = leading @ rotation
    W, V = scale[:, None] * leading, leading / scale[:, None]
    return SelectiveReduction(W, V.mT, _stable(A @ leading.square(), A), "symmetric")


def compensated_selection(P: Tensor, S: Tensor, A: Tensor, r: int) -> SelectiveReduction:
    """Keep `r` of the states, which evolve exactly, and let the output map make up for the others.

    The others are replaced by their linear regression on the kept ones, `M^T = P_:k P_kk^-1`. Backward elimination:
    always the state goes whose loss raises `tr(S (P - P_:k P_kk^-1 P_k:))` the least.

    Args:
        P: covariance of the states (n, n).
        S: weighted covariance of `C` (n, n).
        A: the diagonals (D, n).
        r: number of states to keep.
    """
    scale = P.diagonal().clamp_min(torch.finfo(P.dtype).tiny).sqrt()
    P = P / (scale[:, None] * scale)
    # unit diagonal, and a shift that lets redundant states be inverted
    P = P + _SHIFT * torch.eye(len(P), dtype=P.dtype, device=P.device)
    S = S * (scale[:, None] * scale)
    kept, inverse = torch.arange(len(P), device=P.device), torch.linalg.inv(P)
    while len(kept) > r:
        regression = P[:, kept] @ inverse
        rise = (regression * (S @ regression)).sum(0) / inverse.diagonal()
        i = int(rise.argmin())
        rest = torch.arange(len(kept), device=P.device) != i
        inverse = inverse - inverse[:, i : i + 1] * inverse[i] / inverse[i, i]
        inverse, kept = inverse[rest][:, rest], kept[rest]
    W = torch.eye(len(P), dtype=P.dtype, device=P.device)[:, kept]
    # the shift is no part of the kept rows: they are reproduced exactly
    regression = torch.linalg.solve(P[kept][:, kept], P[kept])
    regression[:, kept] = W[kept].mT
    return SelectiveReduction(W, regression / scale[kept, None] * scale, A[:, kept], "selection")


@dataclass(frozen=True)
class DelayStatistics:
    """Averages over the input from which the mean square output error follows, taking inputs as white.

    Attributes:
        tau: sampled delays, sums of time steps (K, D).
        weight: of each sample (K, D): how many lags it stands for, times the power of the channel.
        S_B, S_C: covariances of the vectors that drive the states, and that read them (n, n).
    """

    tau: Tensor
    weight: Tensor
    S_B: Tensor
    S_C: Tensor

    def coloured(self, P: Tensor, A: Tensor) -> "DelayStatistics":
        """With the `S_B` under which white inputs give the states the covariance `P` that they have.

        This accounts for the memory of the actual inputs, as far as white inputs can.
        """
        decays = torch.exp(self.tau[..., None] * A).flatten(0, 1)
        gains = decays.mT @ (decays * self.weight.reshape(-1, 1))
        values, vectors = torch.linalg.eigh(P / gains)
        return replace(self, S_B=(vectors * values.clamp_min(0)) @ vectors.mT)


def delay_statistics(signals: SelectiveSignals) -> DelayStatistics:
    """Statistics of a sample of signals, float64; lags are sampled in geometric progression."""
    s = signals.time_major
    length, batch, _ = s.u.shape
    elapsed = promote(s.delta, torch.float64).cumsum(0)
    lags = _lags(length, s.u.shape[2])
    samples = max(1, min(_DELAY_SAMPLES, _DELAYS // (len(lags) * s.u.shape[2])))
    stands_for = torch.tensor([*lags, length], dtype=torch.float64, device=elapsed.device).diff()
    tau = []
    for k, lag in enumerate(lags * samples):
        end = lag + (k * 7919) % (length - lag)  # scattered, and the same in every run
        tau.append(elapsed[end, k % batch] - elapsed[end - lag, k % batch])
    drive, gain = promote(s.delta * s.u, torch.float64).square(), promote(s.weight, torch.float64)
    power = drive.mean((0, 1)) * gain.mean((0, 1))
    power = power / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
    return DelayStatistics(
        tau=torch.stack(tau),
        weight=stands_for.repeat(samples)[:, None] * power / samples,
        S_B=_second_moment(s.B, drive.mean(-1)),
        S_C=_second_moment(s.C, gain.mean(-1)),
    )


def _lags(length: int, channels: int) -> list[int]:
    """Numbers of time steps below `length` in geometric progression, fewer if there are many channels."""
    for ratio in (math.sqrt(2), 2.0):
        powers = {round(ratio**k) for k in range(math.ceil(math.log(max(2, length), ratio)))}
        lags = sorted(({0} | powers) & set(range(length)))
        if len(lags) * channels <= _DELAYS:
            break
    return lags


def refined_modes(start: SelectiveReduction, A: Tensor, statistics: DelayStatistics) -> SelectiveReduction:
    """Minimise the averaged output error over both bases and all diagonals by L-BFGS.

    A unit of input at delay `tau` has the error `C . (e^{A tau} - M^T e^{A_r tau} W^T) B`. Averaged over `B`, `C` and
    the delays its square needs no more than n x n terms, and is quadratic in `M`, which is eliminated.

    Raises:
        IllConditioned: the averages leave nothing to minimise, or the minimisation diverged.
    """
    s = statistics
    weight = s.weight.reshape(-1, 1)
    decays = torch.exp(s.tau[..., None] * A).flatten(0, 1)
    weighted = (decays * weight).mT
    whole = (s.S_C * s.S_B * (weighted @ decays)).sum()
    if not whole > 0:
        raise IllConditioned(f"Expected a positive mean square output; found {float(whole)}.")
    W = (start.W / torch.linalg.vector_norm(start.W, dim=0)).requires_grad_()
    log_rates = (-start.A).log().requires_grad_()

    def best_map() -> tuple[Tensor, Tensor]:
        """The best `M` to the present `W` and rates, and how much of the mean square output it explains."""
        modes = torch.exp(-s.tau[..., None] * log_rates.exp()).flatten(0, 1)
        cross = (weighted @ modes) * (s.S_B @ W)
        own = (modes.mT @ (modes * weight)) * (W.mT @ s.S_B @ W)
        M = torch.linalg.solve(own + _SHIFT * torch.diag_embed(own.diagonal()), cross.mT)
        return M, (s.S_C @ cross * M.mT).sum() / whole

    optimizer = torch.optim.LBFGS(
        [W, log_rates], max_iter=_REFINEMENT_STEPS, history_size=20, line_search_fn="strong_wolfe"
    )

    def unexplained() -> Tensor:
        optimizer.zero_grad()
        loss = 1 - best_map()[1]
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(unexplained)
    with torch.no_grad():
        M, A_reduced = best_map()[0], -log_rates.detach().exp()
    if not (M.isfinite().all() and A_reduced.isfinite().all()):
        raise IllConditioned("The refinement of the modes diverged.")
    return SelectiveReduction(W.detach(), M, _stable(A_reduced, A), "refined")


class SelectiveCalibration:
    """Signals to choose a reduction by: some to fit on, others to compare on.

    Args:
        A: the diagonals (D, n), negative.
        fit: signals that the candidates are fitted on.
        held_out: other signals, whose weighted output error decides.
    """

    def __init__(self, A: Tensor, fit: SelectiveSignals, held_out: SelectiveSignals):
        self.A = promote(A, torch.float64)
        self.fit, self.held_out = fit, held_out
        self.fit_outputs, self.held_out_outputs = outputs(fit, self.A), outputs(held_out, self.A)
        self.statistics = delay_statistics(fit)


@torch.no_grad()
def reduce_selective(
    P: Tensor, Q: Tensor, balancing: Balancing, calibration: SelectiveCalibration, r: int, method: str = "balanced"
) -> SelectiveReduction:
    """The best of several reductions to `r` states, each with and without a refit of its output map.

    Args:
        P, Q: input-averaged Gramians (n, n), float64.
        balancing: of `P` and `Q`.
        calibration: the layer's diagonals, and the signals that decide.
        r: states to keep, 1 to n.
        method: "balanced" for all candidates, "selection" for that which keeps r of the states.

    Raises:
        IllConditioned: no candidate is finite.
    """
    A, c = calibration.A, calibration
    if r >= A.shape[1]:
        identity = torch.eye(A.shape[1], dtype=torch.float64, device=A.device)
        return SelectiveReduction(identity, identity, A, "identity", 0.0)
    best, errors = None, {}
    for candidate in _candidates(P, Q, balancing, A, r, c.statistics, method):
        moments = token_moments(c.fit, c.fit_outputs, candidate)
        maps = [candidate.M, *centred_refit(moments, candidate.M, _RIDGES)]
        found = output_errors(c.held_out, c.held_out_outputs, candidate, maps)
        error, k = min((error if math.isfinite(error) else math.inf, k) for k, error in enumerate(found))
        errors[candidate.method] = error
        if error < (math.inf if best is None else best.relative_error):
            best = replace(candidate, M=maps[k], relative_error=error)
    if best is None:
        raise IllConditioned(f"Expected a reduction to {r} states with finite outputs; found the errors {errors}.")
    return replace(best, errors=errors)


def _candidates(
    P: Tensor, Q: Tensor, balancing: Balancing, A: Tensor, r: int, statistics: DelayStatistics, method: str
) -> Iterator[SelectiveReduction]:
    """Reductions to `r` states before any refit; what cannot be computed is left out."""
    attempts = [lambda: compensated_selection(P, statistics.S_C, A, r)]
    if method == "balanced":
        symmetric = symmetric_modes(P, Q, A, r)
        attempts += [
            lambda: rotated_balanced(balancing, A, r),
            lambda: symmetric,
            lambda: refined_modes(symmetric, A, statistics),
            lambda: replace(refined_modes(symmetric, A, statistics.coloured(P, A)), method="refined-coloured"),
        ]
    for attempt in attempts:
        # ValueError: beyond the numerical rank, where other candidates still have an answer
        with contextlib.suppress(ArithmeticError, ValueError, torch.linalg.LinAlgError):
            yield attempt()


def token_moments(signals: SelectiveSignals, y: Tensor, reduction: SelectiveReduction) -> TokenMoments:
    """What the refit of `reduction.M` needs to know; every k-th time step only where that would be too much memory."""
    s, y = signals.time_major, y.transpose(0, 1)
    stride = math.ceil(s.u.shape[0] * s.u.shape[1] * reduction.order**2 / _MOMENT_ELEMENTS)
    moments = []
    for span, states in scan_chunks(s.delta, s.delta * s.u, s.B @ reduction.W.to(s.B), reduction.A.to(s.B)):
        counted = slice(-span.start % stride, None, stride)
        x, w, target = (part[counted].flatten(0, 1) for part in (states, s.weight[span], y[span]))
        weighted = (x * w[..., None]).mT
        moments.append((s.C[span][counted].flatten(0, 1), weighted @ x, (weighted @ target[..., None])[..., 0]))
    return TokenMoments(*(torch.cat(parts) for parts in zip(*moments, strict=True)))


def output_errors(
    signals: SelectiveSignals, y: Tensor, reduction: SelectiveReduction, maps: list[Tensor]
) -> list[float]:
    """Relative root mean square error of the weighted outputs against `y`, for several output maps `M`."""
    s, y = signals.time_major, y.transpose(0, 1)
    rows = [s.C @ M.to(s.C).mT for M in maps]
    squares, whole = [0.0] * len(maps), 0.0
    for span, states in scan_chunks(s.delta, s.delta * s.u, s.B @ reduction.W.to(s.B), reduction.A.to(s.B)):
        w, target = s.weight[span], y[span]
        whole += float((w * target.square()).sum())
        for k, row in enumerate(rows):
            error = (states @ row[span, ..., None])[..., 0] - target
            squares[k] += float((w * error.square()).sum())
    return [math.sqrt(square / whole) if whole > 0 else 0.0 for square in squares]


def _second_moment(vectors: Tensor, weight: Tensor) -> Tensor:
    """Average of `weight v v^T` over the leading dimensions, float64."""
    v = promote(vectors, torch.float64).flatten(0, -2)
    return (v * weight.reshape(-1, 1)).mT @ v / len(v)


def _real_eigenbasis(matrix: Tensor) -> Tensor:
    """Unit columns that span the real invariant subspaces: an eigenvector, or real and imaginary part of a pair's."""
    eigenvalues, vectors = torch.linalg.eig(matrix)
    upper = eigenvalues.imag >= 0
    columns = []
    for value, vector in zip(eigenvalues[upper], vectors[:, upper].mT, strict=True):
        columns += [vector.real] if value.imag == 0 else [vector.real, vector.imag]
    basis = torch.stack(columns, 1)
    return basis / torch.linalg.vector_norm(basis, dim=0)


def _stable(reduced: Tensor, A: Tensor) -> Tensor:
    """`reduced` with every mode decaying, at least at a tenth of the slowest rate of its channel."""
    return torch.minimum(reduced, _SLOWEST * A.amax(1, keepdim=True))
