"""The MIMO SSM (LRU) layer: a linear time-invariant system with a complex diagonal state matrix."""

import torch
from torch import Tensor

from ..models.mimo_ssm.modeling_mimo_ssm import LRU
from ..mor import DiagonalBalancing, DiagonalReduction, DiagonalSystem, Spectrum, promote
from ..surgery import GradientMap
from .base import Reduction, StateReducer, register_reducer

_SMALLEST_MODULUS = 1e-30  # of an eigenvalue: a deadbeat mode would have nu = inf
_FREE_SCALE = 1e-2  # of the free imaginary parts of C, relative to the real ones


def input_gain(nu_log: Tensor) -> Tensor:
    """``γ = sqrt(1 - |λ|²)`` with ``|λ| = exp(-exp(ν))``, accurate near ``|λ| = 1``."""
    return torch.sqrt(-torch.expm1(-2 * torch.exp(nu_log)))


@register_reducer(LRU)
class MimoSSMReducer(StateReducer):
    """Balanced truncation of ``h' = diag(λ) h + γ B̂ u, y = Re(C h)``.

    "balanced" truncates the layer's real map, of order 2n, and the complex system of order n, and keeps the better of
    the two in the H₂ norm; "complex" is the method of CompreSSM (Chahine et al., 2026), section 3.
    """

    methods = ("balanced", "complex")

    def __init__(self, module: LRU, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._balancing: DiagonalBalancing | None = None

    @property
    def state_size(self) -> int:
        return self.module.state_size

    @torch.no_grad()
    def spectrum(self) -> Spectrum:
        self._balancing = DiagonalBalancing(self._system(), self.method)
        return Spectrum(self._balancing.hsv, self.state_size, self._balancing.states)

    @torch.no_grad()
    def reduce(self, states: int) -> Reduction:
        reduction = self._balancing.reduce(states)
        parameters, maps = self._weights(reduction)
        if not all(torch.isfinite(p).all() for p in parameters.values()):
            raise ArithmeticError("The reduced weights are not finite.")
        kept = reduction.hsv[: reduction.order].sum() / reduction.hsv.sum()
        return Reduction(
            state_size=reduction.system.order,
            parameters=parameters,
            gradient_maps=maps,
            method=reduction.method,
            energy_discarded=1 - float(kept),
            error_bound=float(reduction.bound),
            relative_error=float(reduction.h2_error),
        )

    def resize(self, states: int) -> None:
        self.module.resize_state(states)

    def _double(self, name: str) -> Tensor:
        return promote(self.module.get_parameter(name), torch.float64)

    def _system(self) -> DiagonalSystem:
        nu_log, theta, b_re, b_im, c_re, c_im = map(self._double, ("nu_log", "theta", "B_re", "B_im", "C_re", "C_im"))
        lam = torch.polar(torch.exp(-torch.exp(nu_log)), theta)
        return DiagonalSystem(lam, torch.complex(b_re, b_im) * input_gain(nu_log)[:, None], torch.complex(c_re, c_im))

    def _weights(self, reduction: DiagonalReduction) -> tuple[dict[str, Tensor], list[GradientMap]]:
        """Parameters of the reduced system, scaled so that every row of B̂ has norm 1, and the gradient maps."""
        modulus = reduction.system.lam.abs().clamp_min(_SMALLEST_MODULUS)
        nu_log = torch.log(-torch.log(modulus))
        gain, old_gain = input_gain(nu_log), input_gain(self._double("nu_log"))
        norms = torch.linalg.vector_norm(reduction.system.B, dim=1)
        reduction = reduction.rescaled(gain / norms)
        b, c = reduction.system.B / gain[:, None], reduction.system.C
        parameters = {
            "nu_log": nu_log,
            "theta": reduction.system.lam.angle(),
            "B_re": b.real,
            "B_im": b.imag,
            "C_re": c.real,
            "C_im": self._free_imaginary_parts(b.imag, c),
        }
        # gradients are dual to weights: B' = Wᵀ B, C' = C V, so g_B' = Vᵀ g_B and g_C' = g_C W; B = γ B̂ puts γ on
        # both sides, and [Re C, -Im C] a sign on the second half
        sign, old_sign = _imaginary_sign(gain), _imaginary_sign(old_gain)
        b_map = gain.repeat(2)[:, None] * reduction.V.T / old_gain.repeat(2)
        c_map = sign[:, None] * reduction.W.T * old_sign
        return parameters, [GradientMap(("B_re", "B_im"), 0, b_map), GradientMap(("C_re", "C_im"), 1, c_map)]

    def _free_imaginary_parts(self, b_imag: Tensor, c: Tensor) -> Tensor:
        """Im C, small and random where a real mode leaves it free: zero there would also keep θ and Im B without a
        gradient for ever."""
        free = (b_imag == 0).all(dim=1)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(c.shape, generator=generator, dtype=torch.float64).to(c.device)
        size = _FREE_SCALE * c.real.square().mean(dim=0).sqrt()
        return torch.where(free, size * noise, c.imag)


def _imaginary_sign(states: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(states), -torch.ones_like(states)])
