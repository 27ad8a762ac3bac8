"""Least squares fit of the output map of a reduced selective layer.

A selective layer puts out `y_t[d] = C_t . h_t[d]`, with `C_t` (n,) shared by the channels `d`. Its reduction has
states `x_t[d]` (r,) and puts out `(M C_t) . x_t[d]` with a constant `M` (r, n). The weighted squared error over the
channels is a quadratic form in `z_t = M C_t`, so that for the fit each token needs no more than
`H_t = sum_d w x x^T` (r, r) and `g_t = sum_d w y x` (r,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .systems import IllConditioned, promote

_ITERATIONS = 40  # of conjugate gradients; the preconditioner is the normal matrix up to the dependence of C on x
_TOLERANCE = 1e-8  # relative, of the preconditioned residual's square
_SHIFT = 1e-9  # relative to the largest eigenvalue, of covariances that are inverted


@dataclass(frozen=True)
class TokenMoments:
    """What a fit needs of each token: `C` (N, n), `H` (N, r, r) and `g` (N, r)."""

    C: Tensor
    H: Tensor
    g: Tensor


def centred_refit(moments: TokenMoments, M: Tensor, ridges: list[float]) -> list[Tensor]:
    """The maps that minimise `sum_t z_t.H_t z_t - 2 z_t.g_t + ridge * |M' - M|^2` over `M'` (r, n), one per ridge.

    The ridge is measured in the metric of the data, `|X|^2 = tr(H X S X^T)` with `H = sum_t H_t` and `S` the average
    of `C_t C_t^T` weighted by the traces of `H_t`: the normal matrix itself if C and the states were independent.
    Solved by conjugate gradients preconditioned with that metric.

    Args:
        moments: of the tokens to fit.
        M: the present map (r, n), the centre of the ridge, float64.
        ridges: relative weights of the ridge, above 0.

    Raises:
        IllConditioned: the moments are not finite.
    """
    C, H, g = (promote(part, torch.float64) for part in (moments.C, moments.H, moments.g))
    if not (H.isfinite().all() and g.isfinite().all() and C.isfinite().all()):
        raise IllConditioned("Expected finite states and outputs on the calibration tokens; found NaN or infinity.")
    share = H.diagonal(dim1=1, dim2=2).sum(1)
    if share.sum() <= 0:
        return [M for _ in ridges]
    left = H.sum(0)
    right = (C * (share / share.sum())[:, None]).mT @ C
    left_inverse, right_inverse = _inverse(left), _inverse(right)

    def normal(X: Tensor) -> Tensor:
        return torch.einsum("trs,ts->tr", H, C @ X.mT).mT @ C

    gradient = g.mT @ C - normal(M)
    results = []
    for ridge in ridges:

        def operator(X: Tensor, ridge: float = ridge) -> Tensor:
            return normal(X) + ridge * left @ X @ right

        def precondition(X: Tensor, ridge: float = ridge) -> Tensor:
            return left_inverse @ X @ right_inverse / (1 + ridge)

        results.append(M + _conjugate_gradients(operator, gradient, precondition))
    return results


def _inverse(covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return (vectors / eigenvalues.clamp_min(_SHIFT * eigenvalues[-1])) @ vectors.mT


def _conjugate_gradients(operator, b: Tensor, precondition) -> Tensor:
    """Approximate solution of `operator(X) = b` for a symmetric positive (semi-)definite operator on matrices."""
    x, residual = torch.zeros_like(b), b
    z = precondition(residual)
    direction, rho = z, (residual * z).sum()
    target = _TOLERANCE * rho
    for _ in range(_ITERATIONS):
        if rho <= target or rho <= 0:
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        x = x + rho / curvature * direction
        residual = residual - rho / curvature * image
        z = precondition(residual)
        rho, previous = (residual * z).sum(), rho
        direction = z + rho / previous * direction
    return x
