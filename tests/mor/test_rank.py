import itertools
import math

import pytest
import torch
from mor.random_systems import lru_system

from hf_compressm.mor import (
    RANK_RULES,
    DiagonalBalancing,
    EnergyTolerance,
    RankRule,
    ReductionFraction,
    RelativeError,
    Spectrum,
    TargetStateSize,
    apply_constraints,
)


def random_spectrum(seed: int, size: int | None = None, per_state: int = 1) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    size = size or int(torch.randint(1, 30, (), generator=generator))
    steepness = 10 * torch.rand((), generator=generator)
    values = torch.rand(size * per_state, generator=generator).double() ** steepness
    return Spectrum(values.sort(descending=True).values, size, lambda order: math.ceil(order / per_state))


def random_spectra(seed: int) -> list[Spectrum]:
    return [random_spectrum(97 * seed + i, per_state=1 + i % 2) for i in range(1 + seed % 5)]


def flat(size: int) -> Spectrum:
    return Spectrum(torch.ones(size), size)


UNREADABLE = {
    "zero": Spectrum(torch.zeros(12), 12),
    "nan": Spectrum(torch.tensor([1.0, math.nan, 0.5, 0.1]), 4),
    "infinite": Spectrum(torch.tensor([math.inf, 1.0, 0.5, 0.1]), 4),
    "empty": Spectrum(torch.zeros(0), 3),
}
RULES = {
    "energy": EnergyTolerance(0.05),
    "energy, global": EnergyTolerance(0.05, "global"),
    "fraction": ReductionFraction(0.3),
    "fraction, global": ReductionFraction(0.3, "global"),
    "target": TargetStateSize(4, 2),
    "target, global": TargetStateSize(4, 2, "global"),
}


@pytest.mark.parametrize("tolerance", [1e-6, 0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(20))
def test_energy_is_the_smallest_order_that_keeps_enough(seed, tolerance):
    spectrum = random_spectrum(seed)
    values = spectrum.hsv.tolist()
    total = math.fsum(values)
    enough = [r for r in range(1, len(values) + 1) if math.fsum(values[:r]) >= (1 - tolerance) * total * (1 - 1e-15)]
    assert EnergyTolerance(tolerance)([spectrum]) == [min(enough)]


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_global_energy_discards_the_most_values_that_fit(seed, tolerance):
    """Against all ways to cut three small layers."""
    spectra = [random_spectrum(31 * seed + i, size=2 + (seed + i) % 5) for i in range(3)]
    tails = [[math.fsum(s.relative[r:].tolist()) for r in range(s.state_size + 1)] for s in spectra]
    most = max(
        sum(s.state_size - r for s, r in zip(spectra, orders, strict=True))
        for orders in itertools.product(*(range(s.state_size + 1) for s in spectra))
        if sum(tail[r] for tail, r in zip(tails, orders, strict=True)) <= tolerance * 3
    )
    sizes = EnergyTolerance(tolerance, "global")(spectra)
    emptied = sum(size == 1 and tail[0] - tail[1] == 0 for size, tail in zip(sizes, tails, strict=True))
    assert sum(s.state_size for s in spectra) - sum(sizes) >= most - emptied - 2
    assert sum(tail[size] for tail, size in zip(tails, sizes, strict=True)) <= tolerance * 3


def test_global_energy_takes_from_the_layer_that_can_spare_it():
    steep = Spectrum(torch.tensor([0.97, 0.01, 0.01, 0.01]), 4)
    assert EnergyTolerance(0.02, "global")([steep, flat(4)]) == [1, 4]
    assert EnergyTolerance(0.02)([steep, flat(4)]) == [2, 4]


def test_global_energy_does_not_depend_on_a_layers_scale():
    spectra = random_spectra(9)
    scaled = [Spectrum(s.hsv * 10.0 ** (5 * i), s.state_size, s.states) for i, s in enumerate(spectra)]
    rule = EnergyTolerance(0.1, "global")
    assert rule(spectra) == rule(scaled)


def test_a_layer_never_disappears():
    long, short = flat(2000), Spectrum(torch.tensor([1.0]), 1)
    assert EnergyTolerance(0.9, "global")([long, short, short, short])[0] == 1
    assert ReductionFraction(0.99, "global")([short, short, flat(10)]) == [1, 1, 1]


def test_energy_asks_what_an_order_costs():
    balancing = DiagonalBalancing(lru_system(32, 2, max_phase=0.3, decay=0.1), "real")
    spectrum = Spectrum(balancing.hsv, 32, balancing.states)
    order = int((spectrum.hsv.cumsum(0) < 0.98 * spectrum.hsv.sum()).sum()) + 1
    assert EnergyTolerance(0.02)([spectrum]) == [balancing.states(order)]
    assert order / 2 <= balancing.states(order) < 32


def test_a_cost_above_the_present_size_changes_nothing():
    assert EnergyTolerance(0.2)([Spectrum(torch.ones(20), 10, lambda order: order)]) == [10]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("size", [1, 2, 10, 47, 100, 256])
def test_fraction_keeps_the_rest_rounded_upward(fraction, size):
    hundredths = round(100 * (1 - fraction))  # exact: sizes times hundredths are integers
    assert ReductionFraction(fraction)([flat(size)]) == [max(1, -(-size * hundredths // 100))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_global_fraction_keeps_the_same_total_where_shares_are_largest(seed, fraction):
    spectra = random_spectra(seed)
    sizes = ReductionFraction(fraction, "global")(spectra)
    assert sum(sizes) == sum(ReductionFraction(fraction)(spectra))
    kept = [share for s, size in zip(spectra, sizes, strict=True) for share in s.per_state()[1:size].tolist()]
    gone = [share for s, size in zip(spectra, sizes, strict=True) for share in s.per_state()[size:].tolist()]
    assert min(kept, default=math.inf) >= max(gone, default=-math.inf)


@pytest.mark.parametrize("events", [1, 2, 4, 7])
@pytest.mark.parametrize("size", [5, 64, 384])
@pytest.mark.parametrize("budget", ["layer", "global"])
def test_target_is_reached_geometrically_and_exactly_at_the_last_event(events, size, budget):
    sizes, ratios = [size] * 3, []
    for remaining in range(events, 0, -1):
        before = sum(sizes)
        sizes = TargetStateSize(5, remaining, budget)([flat(n) for n in sizes])
        ratios.append(sum(sizes) / before)
    assert sum(sizes) == 15
    assert budget == "global" or sizes == [5, 5, 5]
    # Equal factors, but for rounding to whole states.
    assert max(ratios) - min(ratios) <= 0.12


def test_target_steps_are_those_of_the_formula():
    sizes = [256]
    for remaining in (4, 3, 2, 1):
        sizes.append(TargetStateSize(16, remaining)([flat(sizes[-1])])[0])
    assert sizes == [256, 128, 64, 32, 16]


def test_layers_at_or_below_the_target_stay():
    assert TargetStateSize(8)([flat(20), flat(8), flat(3)]) == [8, 8, 3]
    assert TargetStateSize(100, 3, "global")([flat(20), flat(8)]) == [20, 8]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("seed", range(10))
def test_sizes_are_possible(rule, seed):
    spectra = random_spectra(seed)
    sizes = rule(spectra)
    assert len(sizes) == len(spectra)
    assert all(1 <= size <= s.state_size for size, s in zip(sizes, spectra, strict=True))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_layer_keeps_its_size_and_disturbs_no_other(rule, name):
    readable = [random_spectrum(1, size=20), random_spectrum(2, size=24)]
    broken = UNREADABLE[name]
    assert rule([broken]) == [broken.state_size]
    expected = rule(readable)
    assert rule([readable[0], broken, readable[1]]) == [expected[0], broken.state_size, expected[1]]
    assert rule([]) == []


def test_a_smaller_tolerance_keeps_more():
    spectra = [Spectrum(torch.linspace(1, end, size), size) for size, end in ((12, 0.9), (20, 0.1), (7, 1e-3))]
    for budget in ("layer", "global"):
        sizes = [EnergyTolerance(tolerance, budget)(spectra) for tolerance in (0.5, 0.1, 0.01, 1e-6)]
        for less, more in itertools.pairwise(sizes):
            assert all(a <= b for a, b in zip(less, more, strict=True))
        assert sizes[-1] == [s.state_size for s in spectra]


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (EnergyTolerance, (0,), "tolerance between 0 and 1.* found 0"),
        (EnergyTolerance, (1.0,), "tolerance between 0 and 1"),
        (EnergyTolerance, (math.nan,), "tolerance between 0 and 1"),
        (EnergyTolerance, (0.1, "model"), "budget to be one of layer, global; found 'model'"),
        (ReductionFraction, (1,), "reduction_fraction between 0 and 1"),
        (ReductionFraction, (0.1, None), "budget"),
        (TargetStateSize, (0,), "at least 1; found 0 and 1"),
        (TargetStateSize, (4, 0), "at least 1; found 4 and 0"),
        (TargetStateSize, (4, 1, "both"), "budget"),
    ],
)
def test_options_out_of_range_are_refused(rule, arguments, message):
    with pytest.raises(ValueError, match=message):
        rule(*arguments)


def test_every_rule_of_the_registry_can_be_made_and_called():
    values = {"tolerance": 0.1, "reduction_fraction": 0.1, "target_state_size": 5}
    for name, value in values.items():
        rule = RANK_RULES[name](value, budget="global")
        assert isinstance(rule, RankRule)
        assert rule([flat(10), flat(10)]) != [10, 10]


def constrained(size: int, old: int, **options) -> int:
    return apply_constraints([size], [flat(old)], **{"min_reduction": 0.0, **options})[0]


def test_sizes_are_rounded_upward_but_not_above_the_present():
    assert constrained(9, 64, multiple_of=8) == 16
    assert constrained(16, 64, multiple_of=8) == 16
    assert constrained(57, 60, multiple_of=8) == 60
    assert constrained(2, 60, min_state_size=5) == 5
    assert constrained(2, 60, min_state_size=5, multiple_of=4) == 8
    assert constrained(2, 4, min_state_size=5) == 4


def test_a_gain_that_is_too_small_is_left():
    assert constrained(95, 100, min_reduction=0.05) == 95
    assert constrained(96, 100, min_reduction=0.05) == 100
    assert constrained(9, 10, min_reduction=0.1) == 9
    assert constrained(1, 10, min_reduction=0.9) == 1  # although (1 - 0.9) 10 is below 1 in floating point
    assert constrained(89, 100, min_reduction=0.05, multiple_of=32) == 100
    assert constrained(100, 100) == 100


def test_uniform_takes_the_largest_for_all():
    spectra = [flat(64)] * 3
    assert apply_constraints([5, 30, 17], spectra, multiple_of=8, uniform=True) == [32, 32, 32]
    assert apply_constraints([5, 63, 17], spectra, uniform=True) == [64, 64, 64]
    assert apply_constraints([5, 63, 17], spectra) == [5, 64, 17]
    assert apply_constraints([], [], uniform=True) == []


@pytest.mark.parametrize("seed", range(20))
def test_relative_error_keeps_the_smallest_order_that_fits(seed):
    spectra = random_spectra(seed)
    for error in (1e-6, 1e-3, 0.05, 0.5):
        for spectrum, size in zip(spectra, RelativeError(error)(spectra), strict=True):
            squares = spectrum.hsv.square()
            fits = [r for r in range(len(squares) + 1) if squares[r:].sum() <= error * squares.sum()]
            assert size == spectrum.size_for(fits[0])


def test_relative_error_leaves_unreadable_layers_alone():
    for spectrum in UNREADABLE.values():
        assert RelativeError(0.5)([spectrum]) == [spectrum.state_size]
