import pytest
import scipy.linalg
import torch
from mor.random_systems import MAX_PHASES, lru_system, spectral_norms, system_with, unit_circle

from hf_compressm.mor import (
    DiagonalSystem,
    IllConditioned,
    StateSpace,
    balance,
    complex_gramians,
    error_bound,
    real_gramians,
    truncate,
)

GRAMIANS = {"real": real_gramians, "complex": complex_gramians}


def hsv_by_scipy(system: StateSpace) -> torch.Tensor:
    """Hankel singular values from scipy's Lyapunov solver and Cholesky-like factors of its Gramians."""
    A, B, C = system.A.numpy(), system.B.numpy(), system.C.numpy()
    factors = []
    for a, b in ((A, B), (A.conj().T, C.conj().T)):
        gramian = scipy.linalg.solve_discrete_lyapunov(a, b @ b.conj().T, method="bilinear")
        values, vectors = scipy.linalg.eigh((gramian + gramian.conj().T) / 2)
        factors.append(vectors * values.clip(0) ** 0.5)
    return torch.from_numpy(scipy.linalg.svdvals(factors[1].conj().T @ factors[0]))


def assert_same_hsv(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected[0].item())
    large = expected > 1e-3 * expected[0]
    torch.testing.assert_close(found[large], expected[large], rtol=1e-9, atol=0)


@pytest.mark.parametrize("realization", GRAMIANS)
@pytest.mark.parametrize(("states", "channels"), [(1, 1), (8, 1), (8, 64), (64, 4), (64, 64)])
@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_hsv_equal_scipy(realization, states, channels, max_phase):
    system = lru_system(states, channels, max_phase=max_phase)
    found = balance(*GRAMIANS[realization](system)).hsv
    assert found.dtype == torch.float64
    assert len(found) == (2 * states if realization == "real" else states)
    assert (found.diff() <= 0).all()
    assert_same_hsv(found, hsv_by_scipy(getattr(system, realization)()))


def test_hsv_are_the_singular_values_of_the_hankel_matrix():
    system = lru_system(6, 2, r_min=0.3, r_max=0.8)
    dense = system.real()
    horizon = 150
    markov = [dense.C @ torch.linalg.matrix_power(dense.A, k) @ dense.B for k in range(2 * horizon)]
    hankel = torch.cat([torch.cat(markov[i : i + horizon], 1) for i in range(horizon)])
    expected = torch.linalg.svdvals(hankel)[: 2 * system.order]
    assert_same_hsv(balance(*real_gramians(system)).hsv, expected)


def test_hsv_of_nearly_unstable_decoupled_modes():
    """Each mode on its own input and output has the value |b||c| / (1 - |lam|^2)."""
    gap = torch.tensor([1e-9, 1e-6, 1e-3, 0.5], dtype=torch.float64)
    b, c = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([1.0, 0.1, 1.0, 10.0]).double()
    system = DiagonalSystem(torch.polar(1 - gap, torch.arange(4).double()), b.diag(), c.diag())
    expected = (b * c / (gap * (2 - gap))).sort(descending=True).values
    torch.testing.assert_close(balance(*complex_gramians(system)).hsv, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("realization", GRAMIANS)
def test_the_scale_of_the_states_does_not_matter(realization):
    system = lru_system(16, 3)
    scale = 10 ** torch.linspace(-10, 10, 16, dtype=torch.float64)
    scaled = DiagonalSystem(system.lam, system.B * scale[:, None], system.C / scale)
    assert_same_hsv(balance(*GRAMIANS[realization](scaled)).hsv, balance(*GRAMIANS[realization](system)).hsv)


@pytest.mark.parametrize("realization", GRAMIANS)
@pytest.mark.parametrize("order", [1, 7, 16])
def test_projection_balances_both_gramians(realization, order):
    P, Q = GRAMIANS[realization](lru_system(16, 3))
    balancing = balance(P, Q)
    W, V = balancing.projection(order)
    S = balancing.hsv[:order].diag().to(P.dtype)
    tolerance = {"rtol": 0, "atol": 1e-10 * balancing.hsv[0].item()}
    torch.testing.assert_close(W.mH @ P @ W, S, **tolerance)
    torch.testing.assert_close(V.mH @ Q @ V, S, **tolerance)
    torch.testing.assert_close(W.mH @ V, torch.eye(order, dtype=P.dtype), rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("decay", [0.0, 0.15])
def test_error_is_within_twice_the_discarded_hsv_and_the_reduction_is_stable(seed, decay):
    max_phase = MAX_PHASES[seed % 3]
    channels = (1, 2, 8)[seed % 3]
    system = lru_system(24, channels, seed, max_phase=max_phase, decay=decay)
    dense = system.real()
    balancing = balance(*real_gramians(system))
    z = unit_circle(401)
    exact = dense.transfer_function(z)
    for order in {1, 3, 8, 15, 24, 40} & set(range(balancing.rank + 1)):
        reduced = truncate(dense, *balancing.projection(order))
        error = spectral_norms(exact - reduced.transfer_function(z)).max().item()
        rounding = 1e-10 * balancing.hsv[0].item()
        assert error <= error_bound(balancing.hsv, order) + rounding
        assert error >= balancing.hsv[order].item() * (1 - 1e-2) - rounding  # no reduction of that order does better
        assert reduced.spectral_radius < 1


def test_the_bound_of_the_complex_realization_holds_for_the_real_map():
    system = lru_system(24, 2)
    balancing = balance(*complex_gramians(system))
    z = torch.cat([unit_circle(401), unit_circle(401).conj()])
    exact = system.complex().transfer_function(z)
    reduced = truncate(system.complex(), *balancing.projection(9)).transfer_function(z)
    real_map = ((exact - reduced)[:401] + (exact - reduced)[401:].conj()) / 2
    bound = error_bound(balancing.hsv, 9)
    assert spectral_norms(real_map).max() <= spectral_norms(exact - reduced).max() <= bound


def test_full_order_changes_nothing():
    system = lru_system(8, 3)
    balancing = balance(*real_gramians(system))
    assert balancing.rank == balancing.order == 16
    z = unit_circle(50)
    reduced = truncate(system.real(), *balancing.projection(16))
    torch.testing.assert_close(
        reduced.transfer_function(z), system.real().transfer_function(z), rtol=1e-10, atol=1e-10
    )
    assert error_bound(balancing.hsv, 16) == 0


def test_rank_is_the_order_of_the_minimal_system():
    """Five states of equal eigenvalue behave as one per channel; an unread and an undriven state do not count."""
    lam = torch.polar(torch.full((7,), 0.9).double(), torch.tensor([0.3] * 5 + [1.0, 2.0]).double())
    system = system_with(lam, 2)
    system.B[5] = 0
    system.C[:, 6] = 0
    balancing = balance(*complex_gramians(system))
    assert balancing.rank == 2
    assert torch.count_nonzero(balancing.hsv) == 2
    assert balance(*real_gramians(system)).rank == 4
    z = unit_circle(50)
    reduced = truncate(system.complex(), *balancing.projection(2))
    torch.testing.assert_close(reduced.transfer_function(z), system.complex().transfer_function(z))


def test_a_system_without_a_map_has_rank_zero():
    system = lru_system(4, 2)
    system.C.zero_()
    balancing = balance(*real_gramians(system))
    assert balancing.rank == 0
    assert torch.equal(balancing.hsv, torch.zeros(8, dtype=torch.float64))
    with pytest.raises(ValueError, match="numerical rank 0"):
        balancing.projection(1)


@pytest.mark.parametrize("order", [-1, 0, 17])
def test_orders_out_of_range_are_refused(order):
    with pytest.raises(ValueError, match="between 1 and the numerical rank 16"):
        balance(*real_gramians(lru_system(8, 3))).projection(order)


def test_gramians_that_are_not_finite_are_refused():
    gramian = torch.eye(3, dtype=torch.float64)
    broken = gramian.clone()
    broken[1, 1] = torch.nan
    for pair in ((gramian, broken), (broken, gramian)):
        with pytest.raises(IllConditioned, match="finite"):
            balance(*pair)
