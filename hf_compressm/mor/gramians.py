"""Closed-form Gramians and H2 norms of diagonal systems.

For `h_t = A h_{t-1} + B u_t`, `y_t = C h_t` the controllability and observability Gramians solve the Stein (discrete
Lyapunov) equations (Antoulas, *Approximation of Large-Scale Dynamical Systems*, 2005, section 4.3)::

    P = A P A^H + B B^H,    Q = A^H Q A + C^H C

With a diagonal `A` each entry is a geometric series, so nothing has to be solved.
"""

import torch
from torch import Tensor

from .systems import DiagonalSystem, IllConditioned


def complex_gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Gramians of the complex system `(diag(lam), B, C)`.

    `P_ij = (B B^H)_ij / (1 - lam_i conj(lam_j))` and `Q_ij = (C^H C)_ij / (1 - conj(lam_i) lam_j)`.

    Returns:
        `P` and `Q`, complex128, shape (..., n, n).

    Raises:
        IllConditioned: if an entry is not finite or a modulus of `lam` is not below 1.
    """
    _require_stable(system)
    conjugate, _ = _one_minus_products(system.lam, system.lam)
    P = system.B @ system.B.mH / conjugate
    Q = system.C.mH @ system.C / conjugate.conj()
    _require_finite(P, Q)
    return P, Q


def real_gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Gramians of `system.real()`, the system of order 2n with state `[Re h; Im h]` and the layer's own real map.

    With `S` and `K` the complex Gramians, `T_ij = (B B^T)_ij / (1 - lam_i lam_j)` and
    `R_ij = (C^T C)_ij / (1 - lam_i lam_j)`, since `Re h = (h + conj h)/2` and `Im h = (h - conj h)/2i`::

        P = 1/2 [[Re(S+T), Im(T-S)], [Im(S+T), Re(S-T)]],    Q = 1/2 [[Re(K+R), -Im(K+R)], [Im(K-R), Re(K-R)]]

    Returns:
        `P` and `Q`, float64, symmetric, shape (..., 2n, 2n).

    Raises:
        IllConditioned: if an entry is not finite or a modulus of `lam` is not below 1.
    """
    _require_stable(system)
    conjugate, plain = _one_minus_products(system.lam, system.lam)
    S, T = system.B @ system.B.mH / conjugate, system.B @ system.B.mT / plain
    K, R = system.C.mH @ system.C / conjugate.conj(), system.C.mT @ system.C / plain
    P = _blocks((S + T).real, (T - S).imag, (S + T).imag, (S - T).real) / 2
    Q = _blocks((K + R).real, -(K + R).imag, (K - R).imag, (K - R).real) / 2
    _require_finite(P, Q)
    return P, Q


def gramians(system: DiagonalSystem) -> tuple[Tensor, Tensor]:
    """Gramians of the real map of `system`: :func:`real_gramians`."""
    return real_gramians(system)


def h2_norm(system: DiagonalSystem) -> Tensor:
    """H2 norm of the real map, `sqrt(sum_k ||Re(C diag(lam)^k B)||_F^2)`, float64, shape (...)."""
    _require_stable(system)
    return _inner_product(system, system).clamp_min(0).sqrt()


def h2_error(full: DiagonalSystem, reduced: DiagonalSystem) -> Tensor:
    """Relative H2 error `||G - G_r|| / ||G||` of the real maps, in closed form, float64, shape (...).

    `||G - G_r||^2 = <G, G> - 2 <G, G_r> + <G_r, G_r>` is a difference of equal numbers when the systems agree, so
    errors below about 1e-8 cannot be told from 0. The error relative to a map that is zero is not a number.

    Raises:
        IllConditioned: if an entry is not finite or a modulus of an eigenvalue is not below 1.
    """
    _require_stable(full)
    _require_stable(reduced)
    energy = _inner_product(full, full)
    difference = energy - 2 * _inner_product(full, reduced) + _inner_product(reduced, reduced)
    return (difference.clamp_min(0) / energy).sqrt()


def _inner_product(first: DiagonalSystem, second: DiagonalSystem) -> Tensor:
    """`sum_k tr(Re(C_1 lam_1^k B_1)^T Re(C_2 lam_2^k B_2))`, by `Re x Re y = Re(x y + conj(x) y) / 2`."""
    conjugate, plain = _one_minus_products(first.lam, second.lam)
    direct = (first.C.mT @ second.C) * (first.B @ second.B.mT) / plain
    crossed = (first.C.mH @ second.C) * (first.B.conj() @ second.B.mT) / conjugate.conj()
    return (direct + crossed).real.sum((-2, -1)) / 2


def _one_minus_products(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`1 - first_i conj(second_j)` and `1 - first_i second_j`, each to float64's relative precision.

    Subtracting the product from 1 would lose as many digits as the product is close to 1, differently in each entry,
    and a Gramian of nearly unstable modes would no longer be positive semidefinite. Here the entries belong exactly to
    one system whose `lam` differs from the given one by rounding, for nothing cancels in
    `1 - exp(x + iy) = 2 sin^2(y/2) - expm1(x) cos y - i exp(x) sin y`.
    """
    decay = first.abs().log()[..., :, None] + second.abs().log()[..., None, :]
    (angle_i, folded_i, left_i), (angle_j, folded_j, left_j) = _phases(first), _phases(second)
    same_half = left_i[..., :, None] == left_j[..., None, :]

    def one_minus(sign: int) -> Tensor:
        angle = angle_i[..., :, None] + sign * angle_j[..., None, :]
        folded = folded_i[..., :, None] + sign * folded_j[..., None, :]
        phase = torch.where(same_half, folded, angle)
        real = 2 * (phase / 2).sin().square() - decay.expm1() * phase.cos()
        return torch.complex(real, -decay.exp() * phase.sin())

    return one_minus(-1), one_minus(1)


def _phases(lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angle, angle modulo pi in [-pi/2, pi/2], and whether `lam` lies in the left half plane.

    Sums and differences of angles modulo pi do not round where two numbers of the same half plane are close, not even
    around -1, where angles jump; and a real number of either sign has exactly 0.
    """
    left = lam.real < 0
    folded = torch.where(left, -lam, lam).angle()
    return lam.angle(), folded, left


def _blocks(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    matrix = torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)
    return (matrix + matrix.mT) / 2


def _require_stable(system: DiagonalSystem) -> None:
    if not all(tensor.isfinite().all() for tensor in (system.lam, system.B, system.C)):
        raise IllConditioned("Expected finite lam, B and C; found NaN or infinity. Look at the weights of this layer.")
    radius = float(system.lam.abs().max())
    if radius >= 1:
        raise IllConditioned(
            f"Expected a stable system, every modulus of lam below 1; found {radius:.17g}. Gramians do not exist."
        )


def _require_finite(*matrices: Tensor) -> None:
    if not all(matrix.isfinite().all() for matrix in matrices):
        raise IllConditioned("The Gramians overflow float64: B or C holds entries beyond about 1e150.")
