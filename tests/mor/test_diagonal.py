import math

import pytest
import torch
from mor.random_systems import (
    MAX_PHASES,
    complex_normal,
    lru_system,
    simulate,
    spectral_norms,
    system_with,
    unit_circle,
)

from hf_compressm.mor import (
    DiagonalBalancing,
    DiagonalReduction,
    DiagonalSystem,
    IllConditioned,
    balance,
    diagonal,
    h2_error,
    real_gramians,
    reduce_diagonal,
    states_for_order,
    truncate,
)

METHODS = ("real", "complex", "balanced")


def used_columns(reduction: DiagonalReduction) -> torch.Tensor:
    """All but the imaginary parts of real modes."""
    idle = (reduction.system.lam.imag == 0) & (reduction.method == "real")
    return ~torch.cat([torch.zeros_like(idle), idle])


def assert_consistent(system: DiagonalSystem, reduction: DiagonalReduction, states: int):
    """What must hold of every reduction, of whatever system."""
    reduced = reduction.system
    assert 1 <= reduced.order <= states
    for tensor in (reduced.lam, reduced.B, reduced.C, reduction.W, reduction.V):
        assert tensor.isfinite().all()
    assert reduced.lam.abs().max() < 1
    full, small = system.real(), reduced.real()
    assert torch.equal(small.B, reduction.W.T @ full.B)
    assert torch.equal(small.C, full.C @ reduction.V)
    used = used_columns(reduction)
    assert int(used.sum()) == (reduction.order if reduction.method == "real" else 2 * reduction.order)
    assert not reduction.W[:, ~used].any()
    assert not reduction.V[:, ~used].any()
    # Bases of directions that hardly matter have few digits; down to the numerical rank they have some.
    rounding = 1e-14 * reduction.condition * float(reduction.hsv[0] / reduction.hsv[reduction.order - 1])
    assert rounding < 1
    torch.testing.assert_close(
        reduction.W.T @ reduction.V, torch.diag(used.double()), rtol=0, atol=max(rounding, 1e-12)
    )
    assert reduction.condition <= diagonal.MAX_CONDITION
    assert reduction.h2_error == pytest.approx(h2_error(system, reduced).item(), abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("states", "channels", "keep"), [(1, 1, 1), (8, 1, 3), (32, 4, 15), (32, 32, 8), (64, 8, 64)])
@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_reduction_is_consistent_and_within_its_bound(method, states, channels, keep, max_phase):
    system = lru_system(states, channels, max_phase=max_phase)
    reduction = reduce_diagonal(system, keep, method)
    assert_consistent(system, reduction, keep)
    z = unit_circle(401)
    error = spectral_norms(system.transfer_function(z) - reduction.system.transfer_function(z)).max().item()
    assert error <= reduction.bound + 1e-9 * reduction.hsv[0].item()
    assert len(reduction.hsv) == states * (2 if reduction.method == "real" else 1)


@pytest.mark.parametrize("max_phase", MAX_PHASES)
@pytest.mark.parametrize("keep", [1, 7, 20])
def test_diagonal_form_of_the_real_reduction_equals_the_truncated_system(max_phase, keep):
    system = lru_system(32, 4, max_phase=max_phase)
    reduction = reduce_diagonal(system, keep, "real")
    dense = truncate(system.real(), *balance(*real_gramians(system)).projection(reduction.order))
    z = unit_circle(101)
    exact = dense.transfer_function(z)
    scale = exact.abs().max().item()
    torch.testing.assert_close(reduction.system.transfer_function(z), exact, rtol=0, atol=1e-11 * scale)
    u = torch.randn(60, 4, dtype=torch.float64)
    small = reduction.system.real()
    torch.testing.assert_close(
        simulate(small.A, small.B, small.C, u), simulate(dense.A, dense.B, dense.C, u), rtol=0, atol=1e-11 * scale
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_output_error_is_within_the_bound_times_the_input(method):
    system = lru_system(16, 3, decay=0.3)
    reduction = reduce_diagonal(system, 6, method)
    u = torch.randn(300, 3, dtype=torch.float64)
    full, small = system.real(), reduction.system.real()
    error = simulate(full.A, full.B, full.C, u) - simulate(small.A, small.B, small.C, u)
    assert 0 < torch.linalg.norm(error) <= reduction.bound * torch.linalg.norm(u)


def test_maps_carry_the_state_of_a_lossless_reduction():
    """Where nothing is discarded, `W^T` takes the full state to the reduced one at each step."""
    minimal = lru_system(5, 2)
    system = DiagonalSystem(minimal.lam.repeat(2), minimal.B.repeat(2, 1), minimal.C.repeat(1, 2))
    for method in METHODS:
        reduction = reduce_diagonal(system, 10, method)
        assert reduction.system.order == 5
        assert reduction.h2_error < 1e-6
        full, small = system.real(), reduction.system.real()
        h, x = torch.zeros(20, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
        for u in torch.randn(30, 2, dtype=torch.float64):
            h, x = full.A @ h + full.B @ u, small.A @ x + small.B @ u
        torch.testing.assert_close(reduction.W.T @ h, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(small.C @ x, full.C @ h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_rescaling_changes_parameters_but_no_map(method):
    system = lru_system(16, 3)
    reduction = reduce_diagonal(system, 7, method)
    scaled = reduction.rescaled(1 / torch.linalg.vector_norm(reduction.system.B, dim=1))
    torch.testing.assert_close(torch.linalg.vector_norm(scaled.system.B, dim=1), torch.ones(7, dtype=torch.float64))
    z = unit_circle(50)
    torch.testing.assert_close(scaled.system.transfer_function(z), reduction.system.transfer_function(z))
    torch.testing.assert_close(scaled.W.T @ system.real().B, scaled.system.real().B)
    torch.testing.assert_close(system.real().C @ scaled.V, scaled.system.real().C)
    torch.testing.assert_close(scaled.W.T @ scaled.V, reduction.W.T @ reduction.V, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_balanced_is_never_worse_than_complex(seed):
    generator = torch.Generator().manual_seed(seed)
    states = int(torch.randint(4, 48, (), generator=generator))
    keep = int(torch.randint(1, states, (), generator=generator))
    system = lru_system(states, (1, 2, 8, 32)[seed % 4], seed, max_phase=MAX_PHASES[seed % 3], decay=0.1 * (seed % 2))
    ours, theirs = (reduce_diagonal(system, keep, method) for method in ("balanced", "complex"))
    assert ours.h2_error <= max(theirs.h2_error, diagonal.H2_FLOOR)
    assert ours.system.order <= keep


@pytest.mark.parametrize(("states", "channels", "keep", "gain"), [(64, 4, 32, 1.25), (128, 4, 64, 1.8)])
def test_balanced_beats_complex_where_channels_are_few(states, channels, keep, gain):
    system = lru_system(states, channels)
    ours, theirs = (reduce_diagonal(system, keep, method) for method in ("balanced", "complex"))
    assert ours.method == "real"
    assert ours.h2_error * gain < theirs.h2_error


@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_real_takes_the_largest_order_that_fits(max_phase):
    system = lru_system(12, 2, max_phase=max_phase, decay=0.1)
    balancing = DiagonalBalancing(system, "real")
    rank = balance(*real_gramians(system)).rank
    for keep in range(1, 13):
        fitting = [order for order in range(1, min(2 * keep, rank) + 1) if states_for_order(system, order) <= keep]
        assert balancing.reduce(keep).order == max(fitting)


def test_states_for_order_counts_pairs_once_and_real_modes_once():
    system = lru_system(20, 2, max_phase=0.3)
    W, V = balance(*real_gramians(system)).projection(9)
    lam = torch.linalg.eigvals(truncate(system.real(), W, V).A)
    expected = sum(1 for value in lam if value.imag >= 0)
    assert states_for_order(system, 9) == DiagonalBalancing(system).states(9) == expected
    assert DiagonalBalancing(system, "complex").states(9) == 9
    assert states_for_order(system, 0) == 0


def test_a_balancing_answers_like_the_functions():
    system = lru_system(16, 3)
    for method in METHODS:
        balancing = DiagonalBalancing(system, method)
        once, again = reduce_diagonal(system, 5, method), balancing.reduce(5)
        assert torch.equal(once.system.B, again.system.B)
        assert len(balancing.hsv) == (16 if method == "complex" else 32)


def test_single_precision_and_gradients_are_promoted():
    system = lru_system(12, 3)
    lam, B, C = (getattr(system, name).to(torch.complex64).requires_grad_() for name in ("lam", "B", "C"))
    reduction = reduce_diagonal(DiagonalSystem(lam, B, C), 5)
    assert reduction.W.dtype == reduction.V.dtype == reduction.hsv.dtype == torch.float64
    assert reduction.system.lam.dtype == torch.complex128
    assert not reduction.system.B.requires_grad
    assert reduction.h2_error == pytest.approx(reduce_diagonal(system, 5).h2_error, rel=1e-3)


def clustered(spread: float, modulus: float = 0.9, phase: float = 0.3, channels: int = 4) -> DiagonalSystem:
    offsets = torch.linspace(-1, 1, 40, dtype=torch.float64) * spread
    return system_with(torch.polar(modulus + offsets.flip(0) * (1 - modulus), phase + offsets), channels)


def nearly_unstable(phase: torch.Tensor) -> DiagonalSystem:
    return system_with(torch.polar(1 - 1e-9 * torch.linspace(1, 2, len(phase)).double(), phase.double()), 4)


def chain(length: int) -> DiagonalSystem:
    """Divided differences over close eigenvalues: close to one defective block, with modes that cancel by 1e6."""
    lam = torch.polar(torch.full((length,), 0.8).double(), 1 + 1e-2 * torch.arange(length).double())
    weights = torch.linalg.inv(torch.linalg.vander(lam))[:, :1]
    return DiagonalSystem(lam, weights, complex_normal(3, length, generator=torch.Generator().manual_seed(0)))


HARD = {
    "close": clustered(1e-6),
    "very close": clustered(1e-12),
    "repeated": clustered(0.0),
    "repeated, real": clustered(0.0, phase=0.0),
    "repeated, negative, many channels": clustered(0.0, phase=math.pi, channels=40),
    "nearly defective": chain(4),
    "nearly unstable": nearly_unstable(torch.linspace(0, 3, 40)),
    "nearly unstable, close": nearly_unstable(1 + 1e-9 * torch.linspace(0, 1, 40).double()),
    "nearly unstable, around -1": nearly_unstable(math.pi + 1e-9 * torch.linspace(-1, 1, 40).double()),
    "fast and slow": system_with(torch.tensor([1e-30, 1e-8, 0.5, 1 - 1e-3, 1 - 1e-9], dtype=torch.float64), 2),
    "real, both signs": system_with(torch.linspace(-0.9, 0.9, 40).to(torch.complex128), 4),
    "small": DiagonalSystem(
        *(t * s for t, s in zip(vars(lru_system(20, 2)).values(), (1, 1e-30, 1e-30), strict=True))
    ),
    "large": DiagonalSystem(*(t * s for t, s in zip(vars(lru_system(20, 2)).values(), (1, 1e30, 1e30), strict=True))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HARD)
def test_hard_systems_reduce_sanely(name, method):
    system = HARD[name]
    previous = 0.0
    for keep in sorted({1, system.order // 4, system.order // 2, system.order} - {0}, reverse=True):
        reduction = reduce_diagonal(system, keep, method)
        assert_consistent(system, reduction, keep)
        assert reduction.h2_error <= 1
        assert reduction.h2_error >= previous - 1e-2
        previous = reduction.h2_error


def test_a_defective_truncation_is_left_aside(monkeypatch):
    """Two modes that nearly form one Jordan block, and nothing else to cut."""
    gap = 1e-6
    system = DiagonalSystem(
        torch.tensor([0.5, 0.5 + gap], dtype=torch.float64),
        torch.tensor([[1 / gap], [-1 / gap]], dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.float64),
    )
    for method in METHODS:
        reduction = reduce_diagonal(system, 2, method)
        assert reduction.order == 1
        assert reduction.condition == 1
    monkeypatch.setattr(diagonal, "MAX_TRIES", 1)
    with pytest.raises(
        IllConditioned, match=r"No healthy real reduction to 2 of 2 states: expected .* order 2 has 0\.5"
    ):
        reduce_diagonal(system, 2)


@pytest.mark.parametrize(("failing", "left"), [("real", "complex"), ("complex", "real")])
def test_one_method_steps_in_for_the_other(monkeypatch, failing, left):
    reduce = diagonal.Realization.reduce

    def reduce_or_fail(realization, states):
        if realization.method == failing:
            raise IllConditioned("No healthy reduction.")
        return reduce(realization, states)

    monkeypatch.setattr(diagonal.Realization, "reduce", reduce_or_fail)
    assert reduce_diagonal(lru_system(16, 3), 5).method == left


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["lam", "B", "C"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(method, name, value):
    system = lru_system(6, 2)
    getattr(system, name).view(-1)[2] = value
    with pytest.raises(IllConditioned, match="finite"):
        reduce_diagonal(system, 3, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["B", "C"])
def test_a_system_without_a_map_is_refused(method, name):
    system = lru_system(6, 2)
    getattr(system, name).zero_()
    with pytest.raises(IllConditioned, match="Hankel singular values are 0"):
        reduce_diagonal(system, 3, method)


@pytest.mark.parametrize("method", METHODS)
def test_an_unstable_system_is_refused(method):
    with pytest.raises(IllConditioned, match="stable"):
        reduce_diagonal(DiagonalSystem(torch.tensor([1.0, 0.5]), torch.ones(2, 1), torch.ones(1, 2)), 1, method)


def test_arguments_out_of_range_are_refused():
    system = lru_system(6, 2)
    for states in (-1, 0, 7):
        with pytest.raises(ValueError, match=f"between 1 and the system's 6; found {states}"):
            reduce_diagonal(system, states)
    with pytest.raises(ValueError, match="method"):
        reduce_diagonal(system, 3, "modal")
    with pytest.raises(ValueError, match="one system"):
        reduce_diagonal(DiagonalSystem(torch.rand(2, 3), torch.rand(2, 3, 1), torch.rand(2, 1, 3)), 1)


def check_size(states: int, channels: int, max_phase: float):
    system = lru_system(states, channels, max_phase=max_phase)
    balancing = DiagonalBalancing(system)
    for keep in (max(1, states // 4), max(1, states // 2)):
        reduction = balancing.reduce(keep)
        assert_consistent(system, reduction, keep)
        assert reduction.h2_error < 1
        assert math.isfinite(reduction.bound)
        assert balancing.states(reduction.order) <= 2 * keep


@pytest.mark.parametrize("max_phase", MAX_PHASES)
@pytest.mark.parametrize("channels", [1, 8, 64, 512])
@pytest.mark.parametrize("states", [8, 64])
def test_all_shapes_give_finite_results(states, channels, max_phase):
    check_size(states, channels, max_phase)


@pytest.mark.parametrize("max_phase", MAX_PHASES)
def test_a_moderate_size_gives_finite_results(max_phase):
    check_size(192, 8, max_phase)


@pytest.mark.slow
@pytest.mark.parametrize("max_phase", MAX_PHASES)
@pytest.mark.parametrize("channels", [1, 8, 64, 512])
@pytest.mark.parametrize("states", [256, 1024])
def test_large_shapes_give_finite_results(states, channels, max_phase):
    check_size(states, channels, max_phase)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_computes_what_the_cpu_computes(method):
    system = lru_system(32, 4)
    on_gpu = DiagonalSystem(*(tensor.cuda() for tensor in (system.lam, system.B, system.C)))
    found, expected = reduce_diagonal(on_gpu, 13, method), reduce_diagonal(system, 13, method)
    assert found.W.is_cuda
    assert found.system.lam.is_cuda
    assert (found.order, found.method) == (expected.order, expected.method)
    torch.testing.assert_close(found.hsv.cpu(), expected.hsv, rtol=0, atol=1e-12 * expected.hsv[0].item())
    assert found.h2_error == pytest.approx(expected.h2_error, rel=1e-9)
