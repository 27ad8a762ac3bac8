import math

import pytest
import torch
from mor.random_systems import MAX_PHASES, complex_normal, lru_system, simulate, system_with, unit_circle
from scipy.linalg import solve_discrete_lyapunov

from hf_compressm.mor import (
    DiagonalSystem,
    IllConditioned,
    balance,
    complex_gramians,
    gramians,
    h2_error,
    h2_norm,
    real_gramians,
)

REALIZATIONS = [("complex", complex_gramians), ("real", real_gramians)]


@pytest.mark.parametrize(("name", "gramians_of"), REALIZATIONS)
@pytest.mark.parametrize(("states", "channels"), [(1, 1), (8, 1), (8, 64), (40, 8)])
@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_closed_form_equals_scipy(name, gramians_of, states, channels, max_phase):
    system = lru_system(states, channels, max_phase=max_phase)
    dense = getattr(system, name)()
    P, Q = gramians_of(system)
    A, B, C = dense.A.numpy(), dense.B.numpy(), dense.C.numpy()
    # The bilinear method solves the Stein equation exactly, without iteration.
    expected_P = torch.from_numpy(solve_discrete_lyapunov(A, B @ B.conj().T, method="bilinear"))
    expected_Q = torch.from_numpy(solve_discrete_lyapunov(A.conj().T, C.conj().T @ C, method="bilinear"))
    assert torch.linalg.norm(P - expected_P) <= 1e-12 * torch.linalg.norm(expected_P)
    assert torch.linalg.norm(Q - expected_Q) <= 1e-12 * torch.linalg.norm(expected_Q)


@pytest.mark.parametrize(("name", "gramians_of"), REALIZATIONS)
def test_lyapunov_residuals_vanish(name, gramians_of):
    system = lru_system(64, 8)
    dense = getattr(system, name)()
    P, Q = gramians_of(system)
    residual_P = dense.A @ P @ dense.A.mH + dense.B @ dense.B.mH - P
    residual_Q = dense.A.mH @ Q @ dense.A + dense.C.mH @ dense.C - Q
    assert torch.linalg.norm(residual_P) <= 1e-14 * torch.linalg.norm(P)
    assert torch.linalg.norm(residual_Q) <= 1e-14 * torch.linalg.norm(Q)


@pytest.mark.parametrize("gramians_of", [complex_gramians, real_gramians])
def test_a_batch_equals_its_members(gramians_of):
    systems = [lru_system(5, 2, seed=seed) for seed in range(4)]
    batch = DiagonalSystem(*(torch.stack([getattr(s, name) for s in systems]) for name in ("lam", "B", "C")))
    P, Q = gramians_of(batch)
    for i, system in enumerate(systems):
        torch.testing.assert_close((P[i], Q[i]), gramians_of(system))
    torch.testing.assert_close(h2_norm(batch), torch.stack([h2_norm(system) for system in systems]))


def test_the_gramians_of_a_system_are_those_of_its_real_map():
    system = lru_system(3, 2)
    torch.testing.assert_close(gramians(system), real_gramians(system), rtol=0, atol=0)


@pytest.mark.parametrize("centre", [0.0, 0.3, math.pi / 2, math.pi])
def test_nearly_unstable_clusters_keep_gramians_positive_semidefinite(centre):
    """Seams at 1, -1 and +-i included, where angles jump or fold."""
    offset = torch.linspace(-1, 1, 32, dtype=torch.float64)
    lam = torch.polar(1 - 1e-9 * (1.5 + offset), centre + 1e-9 * offset.flip(0))
    for gramians_of in (complex_gramians, real_gramians):
        for gramian in gramians_of(system_with(lam, 4)):
            scale = gramian.diagonal().real.rsqrt()
            eigenvalues = torch.linalg.eigvalsh(gramian * scale[:, None] * scale)
            assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]


@pytest.mark.parametrize("modulus", [0.0, 1e-8, 0.5, 1 - 1e-3, 1 - 1e-9])
@pytest.mark.parametrize("phase", [0.0, 1.0, math.pi])
def test_one_state_has_the_scalar_gramian(modulus, phase):
    lam = torch.polar(torch.tensor([modulus], dtype=torch.float64), torch.tensor([phase], dtype=torch.float64))
    P, Q = complex_gramians(DiagonalSystem(lam, torch.tensor([[3j]]), torch.tensor([[2.0]])))
    # 1 - |lam|^2 itself is known only to rounding of lam over its distance from the circle.
    gap = (1 - float(lam.abs())) * (1 + float(lam.abs()))
    assert P.item() == pytest.approx(9 / gap, rel=4e-16 / gap + 1e-15)
    assert Q.item() == pytest.approx(4 / gap, rel=4e-16 / gap + 1e-15)


def test_a_real_mode_has_no_imaginary_state():
    """Rounding must not make a second Hankel singular value of a real mode that is driven in phase."""
    lam = torch.tensor([0.9, -0.9, 1 - 1e-9, -1 + 1e-9], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(4, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 1j, 1, 1j])[:, None]
    P, Q = real_gramians(DiagonalSystem(lam, B, complex_normal(3, 4, generator=generator)))
    balancing = balance(P, Q)
    assert balancing.rank == 4
    assert torch.count_nonzero(balancing.hsv) == 4


def test_h2_norm_equals_the_energy_of_the_impulse_response():
    system = lru_system(6, 3, r_min=0.5, r_max=0.9)
    dense = system.real()
    impulses = torch.zeros(400, 3, 3, dtype=torch.float64)
    impulses[0] = torch.eye(3)
    energy = sum(simulate(dense.A, dense.B, dense.C, impulses[:, i]).square().sum() for i in range(3))
    assert h2_norm(system).item() == pytest.approx(math.sqrt(energy), rel=1e-12)


@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_h2_error_equals_the_mean_over_a_frequency_grid(max_phase):
    full = lru_system(12, 3, r_min=0.5, r_max=0.95, max_phase=max_phase)
    other = DiagonalSystem(full.lam[:7] * 0.98, full.B[:7], full.C[:, :7])
    z = torch.polar(torch.ones(2048).double(), torch.arange(2048).double() * (2 * math.pi / 2048))
    exact, reduced = full.transfer_function(z), other.transfer_function(z)
    expected = torch.linalg.norm(exact - reduced) / torch.linalg.norm(exact)
    assert h2_error(full, other).item() == pytest.approx(expected.item(), rel=1e-10)


def test_h2_error_of_a_system_against_itself_is_below_its_floor():
    system = lru_system(64, 8, max_phase=0.1)
    permuted = DiagonalSystem(system.lam.flip(0), system.B.flip(0), system.C.flip(1))
    assert h2_error(system, permuted) <= 1e-7


def test_h2_error_ignores_what_the_real_part_does_not_show():
    """A conjugate state gives the same real output."""
    system = lru_system(4, 2)
    assert h2_error(system, DiagonalSystem(system.lam.conj(), system.B.conj(), system.C.conj())) <= 1e-7


@pytest.mark.parametrize("function", [complex_gramians, real_gramians, h2_norm])
@pytest.mark.parametrize("name", ["lam", "B", "C"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(function, name, value):
    system = lru_system(4, 2)
    getattr(system, name).view(-1)[1] = value
    with pytest.raises(IllConditioned, match="finite"):
        function(system)


@pytest.mark.parametrize("modulus", [1.0, 1.01])
def test_unstable_systems_are_refused(modulus):
    system = DiagonalSystem(torch.tensor([0.5, -modulus]), torch.ones(2, 1), torch.ones(1, 2))
    for function in (complex_gramians, real_gramians, h2_norm):
        with pytest.raises(IllConditioned, match="stable"):
            function(system)


def test_overflow_is_refused():
    huge = torch.full((2, 1), 1e200, dtype=torch.float64)
    for function in (complex_gramians, real_gramians):
        with pytest.raises(IllConditioned, match="overflow"):
            function(DiagonalSystem(torch.tensor([0.5, 0.4]), huge, torch.ones(1, 2)))


def test_the_imaginary_parts_of_a_frequency_response_mirror():
    system = lru_system(5, 2)
    z = unit_circle(9)
    torch.testing.assert_close(system.transfer_function(z.conj()), system.transfer_function(z).conj())
