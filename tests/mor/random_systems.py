"""Random diagonal systems for the tests of `hf_compressm.mor`."""

import math

import torch
from torch import Tensor

from hf_compressm.mor import DiagonalSystem

MAX_PHASES = (0.1, math.pi / 10, 2 * math.pi)


def lru_system(
    states: int,
    channels: int,
    seed: int = 0,
    *,
    r_min: float = 0.9,
    r_max: float = 0.999,
    max_phase: float = 2 * math.pi,
    decay: float = 0.0,
) -> DiagonalSystem:
    """An LRU at its ring initialisation; `decay` lets the states differ in weight, as training does."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, states, generator=generator, dtype=torch.float64)
    modulus = (r_min**2 + uniform[0] * (r_max**2 - r_min**2)).sqrt()
    lam = torch.polar(modulus, max_phase * uniform[1])
    B = complex_normal(states, channels, generator=generator) / math.sqrt(channels)
    weight = (1 - modulus**2).sqrt() * torch.exp(-decay * torch.arange(states))
    return DiagonalSystem(
        lam, B * weight[:, None], complex_normal(channels, states, generator=generator) / math.sqrt(states)
    )


def system_with(lam: Tensor, channels: int, seed: int = 0) -> DiagonalSystem:
    """A system with the given eigenvalues and random normalised input and output matrices."""
    generator = torch.Generator().manual_seed(seed)
    gain = (1 - lam.abs().square()).sqrt()[:, None]
    B = complex_normal(len(lam), channels, generator=generator)
    return DiagonalSystem(lam, B * gain, complex_normal(channels, len(lam), generator=generator))


def complex_normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.complex128)


def unit_circle(points: int = 801) -> Tensor:
    """Equidistant points of the closed upper half of the unit circle; a real map's other half mirrors it."""
    return torch.polar(torch.ones(points, dtype=torch.float64), torch.linspace(0, math.pi, points).double())


def spectral_norms(matrices: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrices, ord=2)


def simulate(A: Tensor, B: Tensor, C: Tensor, u: Tensor) -> Tensor:
    """Output (time, p) of `h_t = A h_{t-1} + B u_t`, `y_t = C h_t` for the input `u` (time, m)."""
    h = A.new_zeros(A.shape[0])
    outputs = []
    for u_t in u.to(A.dtype):
        h = A @ h + B @ u_t
        outputs.append(C @ h)
    return torch.stack(outputs)
