"""Balanced truncation of a diagonal complex system to a smaller diagonal complex system.

Balanced truncation leaves a dense `A`; its eigenvectors bring it back to the diagonal form that the layer computes
with. There are two ways to begin. `complex` balances `(diag(lam), B, C)` as a complex system, as Chahine et al. do
(CompreSSM, ICLR 2026, arXiv 2510.02823). But only the real part of the output counts: `real` balances the real system
of order 2n, of whose modes a conjugate pair costs one complex state. `balanced` takes the better of both.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .balancing import Balancing, balance, error_bound, truncate
from .gramians import complex_gramians, h2_error, real_gramians
from .systems import DiagonalSystem, IllConditioned, StateSpace, real_embedding

METHODS = ("balanced", "real", "complex")
MAX_CONDITION = 1e4
"""Eigenvector matrices beyond this are refused: they magnify float32's rounding of the weights to some 1e-3."""
MAX_TRIES = 16
"""How many orders, walking down from the largest, are diagonalised before a method gives up."""
H2_FLOOR = 1e-8
"""Relative H2 errors below this are rounding."""


@dataclass(frozen=True)
class DiagonalReduction:
    """A reduced diagonal system of r states and the real maps that lead to it from the full one of n.

    With `B_R = [Re B; Im B]` and `C_R = [Re C, -Im C]` of either system, `B_R' = W^T B_R` and `C_R' = C_R V`.

    Attributes:
        system: the reduced system. A real mode has real `lam`, `B` and `C`.
        W, V: float64, (2n, 2r), `W^T V` the identity but for the imaginary parts of real modes, whose columns are 0.
        order: order m of the truncation (2 per conjugate pair, 1 per real mode; r for `complex`).
        hsv: Hankel singular values of the realization that was truncated, (2n,) for `real`, (n,) for `complex`.
        method: `"real"` or `"complex"`.
        condition: condition number of the matrix of eigenvectors.
        bound: `2 sum(hsv[order:])`, an upper bound of the H-infinity error.
        h2_error: relative H2 error of the real map.
    """

    system: DiagonalSystem
    W: Tensor
    V: Tensor
    order: int
    hsv: Tensor
    method: str
    condition: float
    bound: float
    h2_error: float

    def rescaled(self, scale: Tensor) -> "DiagonalReduction":
        """The same map, each state multiplied by a positive factor: `B` by `scale` (r,), `C` by `1/scale`."""
        scale = scale.to(self.W)
        both = torch.cat([scale, scale])
        system = DiagonalSystem(self.system.lam, self.system.B * scale[:, None], self.system.C / scale)
        return replace(self, system=system, W=self.W * both, V=self.V / both)


class Realization:
    """One balanced realization of a diagonal system, `"real"` or `"complex"`, from which any order can be cut.

    The expensive parts are done once, on first use, and shared by all orders.

    Raises:
        IllConditioned: on first use, if the system has NaN or infinite entries or is not stable.
        ValueError: if the system is a batch.
    """

    def __init__(self, system: DiagonalSystem, method: str):
        if system.lam.ndim != 1:
            raise ValueError(f"Expected one system, lam of shape (n,); found {tuple(system.lam.shape)}.")
        self.full = system
        self.method = method

    @cached_property
    def balancing(self) -> Balancing:
        return balance(*(real_gramians if self.method == "real" else complex_gramians)(self.full))

    @cached_property
    def balanced(self) -> StateSpace:
        """The balanced realization of the order of the numerical rank; truncations are its leading blocks."""
        system = self.full.real() if self.method == "real" else self.full.complex()
        return truncate(system, *self.balancing.projection(self.balancing.rank))

    @property
    def hsv(self) -> Tensor:
        """Hankel singular values, descending, float64: (2n,) for `real`, (n,) for `complex`."""
        return self.balancing.hsv

    def states(self, order: int) -> int:
        """Complex states that a truncation to `order` costs: `(order + number of real modes) / 2` if real.

        An order above the numerical rank costs what the numerical rank costs.
        """
        order = min(order, self.balancing.rank)
        if self.method == "complex" or order < 1:
            return order
        return self._states(_eigen(torch.linalg.eigvals, self.balanced.A[:order, :order]))

    def reduce(self, states: int) -> DiagonalReduction:
        """The largest healthy truncation that costs at most `states` states.

        Healthy is finite, strictly stable and with well-conditioned eigenvectors. Orders are tried downwards.

        Raises:
            IllConditioned: if none of the orders tried is healthy.
        """
        if not 1 <= states <= self.full.order:
            raise ValueError(f"Expected states between 1 and the system's {self.full.order}; found {states}.")
        order = min(2 * states if self.method == "real" else states, self.balancing.rank)
        if order == 0:
            raise IllConditioned(
                "All Hankel singular values are 0: no state is both driven by the input and read out."
            )
        found = ""
        for _ in range(MAX_TRIES):
            lam, vectors = _eigen(torch.linalg.eig, self.balanced.A[:order, :order])
            excess = self._states(lam) - states
            if excess <= 0:
                lam, basis = _real_modes(lam, vectors) if self.method == "real" else (lam, vectors)
                radius, condition = float(lam.abs().max()), _condition(basis)
                if radius < 1 and condition <= MAX_CONDITION:
                    return self._reduction(order, lam, basis, condition)
                found = f"; order {order} has {radius:.6g} and {condition:.2g}"
            # One order less saves one state at most, real modes aside, so no order that fits is passed over.
            order -= max(1, excess)
            if order < 1:
                break
        raise IllConditioned(
            f"No healthy {self.method} reduction to {states} of {self.full.order} states: expected a spectral radius "
            f"below 1 and eigenvectors of condition at most {MAX_CONDITION:g}{found}. Choose another number of states."
        )

    def _states(self, lam: Tensor) -> int:
        return len(lam) if self.method == "complex" else (len(lam) + int((lam.imag == 0).sum())) // 2

    def _reduction(self, order: int, lam: Tensor, basis: Tensor, condition: float) -> DiagonalReduction:
        left, right = self.balancing.projection(order)
        W, V = left @ torch.linalg.inv(basis).mH, right @ basis
        if self.method == "complex":
            W, V = real_embedding(W), real_embedding(V)
        else:
            idle = W.new_zeros(W.shape[0], 2 * len(lam) - order)
            W, V = torch.cat([W, idle], 1), torch.cat([V, idle], 1)
        full, r = self.full.real(), len(lam)
        B, C = W.T @ full.B, full.C @ V
        system = DiagonalSystem(lam, torch.complex(B[:r], B[r:]), torch.complex(C[:, :r], -C[:, r:]))
        error = float(h2_error(self.full, system))
        return DiagonalReduction(
            system, W, V, order, self.hsv, self.method, condition, error_bound(self.hsv, order), error
        )


class DiagonalBalancing:
    """What a layer is asked before and while it is reduced: its spectrum, what an order costs, the reduction.

    Args:
        system: `lam` (n,), `B` (n, m), `C` (p, n).
        method: as in :func:`reduce_diagonal`.

    Nothing is computed before it is asked for, and nothing twice.
    """

    def __init__(self, system: DiagonalSystem, method: str = "balanced"):
        if method not in METHODS:
            raise ValueError(f"Expected method to be one of {', '.join(METHODS)}; found {method!r}.")
        methods = ("real", "complex") if method == "balanced" else (method,)
        self.realizations = [Realization(system, each) for each in methods]

    @property
    def hsv(self) -> Tensor:
        """Hankel singular values, descending, float64: (n,) for `"complex"`, else the real realization's (2n,)."""
        return self.realizations[0].hsv

    def states(self, order: int) -> int:
        """States that a truncation to the `order` largest of `hsv` costs."""
        return self.realizations[0].states(order)

    def reduce(self, states: int) -> DiagonalReduction:
        """The reduction to at most `states` states; see :func:`reduce_diagonal`."""
        reductions, failures = [], []
        for realization in self.realizations:
            try:
                reductions.append(realization.reduce(states))
            except IllConditioned as failure:
                failures.append(str(failure))
        if not reductions:
            raise IllConditioned(" ".join(dict.fromkeys(failures)))
        return min(reductions, key=lambda each: (max(each.h2_error, H2_FLOOR), each.system.order))


def reduce_diagonal(system: DiagonalSystem, states: int, method: str = "balanced") -> DiagonalReduction:
    """Reduce an unbatched diagonal system to at most `states` states.

    Fewer come back where the numerical rank, or the conditioning of the eigenvectors, asks for it.

    Args:
        system: `lam` (n,), `B` (n, m), `C` (p, n).
        states: between 1 and n.
        method: `"real"`, `"complex"`, or `"balanced"`, which computes both and keeps the one of the lower H2 error.

    Raises:
        IllConditioned: if the system or all reductions tried are unfit for float64; the sentence says what was found.
        ValueError: if `states` or `method` is out of range.
    """
    return DiagonalBalancing(system, method).reduce(states)


def states_for_order(system: DiagonalSystem, order: int) -> int:
    """States that a truncation of the real realization to `order` costs: `(order + number of real modes) / 2`.

    To ask about several orders of one system, keep a :class:`DiagonalBalancing`.
    """
    return Realization(system, "real").states(order)


def _real_modes(lam: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """One eigenvalue per conjugate pair, then the real ones; and a real basis `[2 Re e, e_real, -2 Im e]` (m, m).

    A pair's part of the real state is `e h + conj(e h) = 2 Re(e) Re(h) - 2 Im(e) Im(h)`.
    """
    pairs, reals = lam.imag > 0, lam.imag == 0
    e = vectors[:, pairs]
    basis = torch.cat([2 * e.real, vectors[:, reals].real, -2 * e.imag], 1)
    return torch.cat([lam[pairs], lam[reals]]), basis


def _condition(basis: Tensor) -> float:
    singular_values = torch.linalg.svdvals(basis)
    return float(singular_values[0] / singular_values[-1])


def _eigen(function, matrix: Tensor):
    try:
        return function(matrix)
    except torch.linalg.LinAlgError as error:
        raise IllConditioned(f"The eigenvalues of the truncated system did not converge: {error}") from error
