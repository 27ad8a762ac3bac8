"""Square-root balanced truncation.

Moore, *Principal component analysis in linear systems*, IEEE TAC 1981; Laub, Heath, Paige and Ward, *Computation of
system balancing transformations*, IEEE TAC 1987; Tombs and Postlethwaite, *Truncated balanced realization of a stable
non-minimal state-space system*, Int. J. Control 1987 (the rank-revealing form, which never inverts a transformation).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .systems import IllConditioned, StateSpace

RANK_TOLERANCE = 1e-11
"""Directions of smaller relative Hankel singular value are not kept: `W^H V = I` holds to rounding over that value."""


@dataclass(frozen=True)
class Balancing:
    """The Hankel singular values of a system and the bases that balance it; made by :func:`balance`.

    Attributes:
        hsv: Hankel singular values, descending, float64, shape (n,); those that cannot be told from zero are 0.
        left, right: `L_q U` and `L_p V` of the square-root method, shape (n, rank).
    """

    hsv: Tensor
    left: Tensor
    right: Tensor

    @property
    def order(self) -> int:
        return self.hsv.shape[0]

    @property
    def rank(self) -> int:
        """Numerical rank: how many Hankel singular values are above `RANK_TOLERANCE` times the largest."""
        return self.left.shape[1]

    def projection(self, r: int) -> tuple[Tensor, Tensor]:
        """Bases `W` and `V` of the `r` leading balanced directions, (n, r) each, with `W^H V = I`.

        `W^H P W = V^H Q V = diag(hsv[:r])`.

        Raises:
            ValueError: if `r` is not between 1 and the numerical rank.
        """
        if not 1 <= r <= self.rank:
            raise ValueError(f"Expected an order between 1 and the numerical rank {self.rank}; found {r}.")
        scale = self.hsv[:r].rsqrt()
        return self.left[:, :r] * scale, self.right[:, :r] * scale


def balance(P: Tensor, Q: Tensor) -> Balancing:
    """Balance a system given by its Gramians `P` and `Q` (n, n), Hermitian, by the square-root method.

    `P = L_p L_p^H`, `Q = L_q L_q^H`, `U S V^H = svd(L_q^H L_p)`; the singular values are the Hankel singular values.

    Raises:
        IllConditioned: if the Gramians are not finite or a decomposition does not converge.
    """
    if not (P.isfinite().all() and Q.isfinite().all()):
        raise IllConditioned("Expected finite Gramians; found NaN or infinity.")
    try:
        Lp, Lq = _factor(P), _factor(Q)
        U, hsv, Vh = torch.linalg.svd(Lq.mH @ Lp, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise IllConditioned(f"A decomposition of the Gramians did not converge: {error}") from error
    n = P.shape[-1]
    padded = hsv.new_zeros(n)
    padded[: len(hsv)] = torch.where(hsv > n * torch.finfo(hsv.dtype).eps * hsv[:1], hsv, 0)
    rank = int((padded > RANK_TOLERANCE * padded[0]).sum())
    return Balancing(padded, Lq @ U[:, :rank], Lp @ Vh.mH[:, :rank])


def truncate(system: StateSpace, W: Tensor, V: Tensor) -> StateSpace:
    """Petrov-Galerkin projection `(W^H A V, W^H B, C V)` with `W` and `V` (n, r), `W^H V = I`."""
    return StateSpace(W.mH @ system.A @ V, W.mH @ system.B, system.C @ V)


def error_bound(hsv: Tensor, r: int) -> float:
    """`2 sum(hsv[r:])`, the H-infinity bound of balanced truncation to order `r` (Enns 1984; Glover 1984).

    In discrete time: Hinrichsen and Pritchard, *An improved error estimate for reduced-order models of discrete-time
    systems*, IEEE TAC 1990.
    """
    return 2 * float(hsv[r:].sum())


def _factor(gramian: Tensor) -> Tensor:
    """`L` with `L L^H` the Gramian, without the directions that rounding cannot tell from zero."""
    diagonal = gramian.diagonal().real.clamp_min(0)
    # Unit diagonal: modes of very different energy, as nearly unstable ones have, keep their own relative precision.
    scale = torch.where(diagonal > 0, diagonal, 1).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(gramian / (scale[:, None] * scale))
    threshold = len(scale) * torch.finfo(scale.dtype).eps * eigenvalues.max()
    kept = eigenvalues > threshold.clamp_min(0)
    return scale[:, None] * vectors[:, kept] * eigenvalues[kept].sqrt()
