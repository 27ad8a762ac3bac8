"""Gramians and reductions of Mamba-2 layers, against plain loops over the time-varying system."""

import pytest
import torch
from mor.random_signals import all_ssd_states, normal, padded, ssd_layer

from hf_compressm.mor import (
    apply_map,
    balance,
    balanced_maps,
    instantaneous_sums,
    refined_maps,
    select_states,
    ssd_states,
    ssd_token_moments,
)


def grouped(h, groups):
    """(batch, L, H, P, n) -> (batch, L, G, channels of the group, n)."""
    return h.unflatten(2, (groups, -1)).flatten(3, 4)


def weights(signals):
    return signals.weight.unflatten(2, (signals.groups, -1)).flatten(3)


def balancings(sums):
    P, Q = sums["P"] / sums["states"], sums["Q"] / sums["tokens"]
    return [balance(*gramians) for gramians in zip(P, Q, strict=True)]


@pytest.mark.parametrize("stride", [1, 5, 24, 100])
def test_states_are_those_of_a_plain_loop(stride):
    A, signals = ssd_layer()
    expected = grouped(all_ssd_states(A, signals), 2)
    times = []
    for t, h in ssd_states(signals, A, stride):
        times.append(t)
        torch.testing.assert_close(h, expected[:, t])
    assert times == [*range(stride - 1, 23, stride), 23]


@pytest.mark.parametrize("stride", [1, 5])
def test_sums_are_those_of_a_plain_loop(stride):
    A, signals = ssd_layer()
    times = [*range(stride - 1, 23, stride), 23]
    h, w = grouped(all_ssd_states(A, signals), 2)[:, times], weights(signals)[:, times]
    read = h * signals.C[:, times, :, None]
    found = instantaneous_sums(signals, A, stride)
    torch.testing.assert_close(found["P"], torch.einsum("blgp,blgpn,blgpm->gnm", w, h, h))
    torch.testing.assert_close(found["M"], torch.einsum("blgp,blgpn,blgpm->gnm", w, read, read))
    torch.testing.assert_close(found["Q"], torch.einsum("blgn,blgm->gnm", signals.C, signals.C))
    assert (found["states"], found["tokens"]) == (3 * len(times), 3 * 24)


def test_padding_adds_nothing():
    A, signals = ssd_layer()
    expected = instantaneous_sums(signals, A)
    found = instantaneous_sums(padded(signals, 4, 6), A)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("r", [2, 4, 6])
def test_the_mean_square_error_is_the_sum_of_the_squared_singular_values(r):
    """If C and h are independent: here C is drawn afresh."""
    A, signals = ssd_layer(batch=100, length=60, groups=2, head_dim=2)
    parts = balancings(instantaneous_sums(signals, A))
    B_map, C_map = balanced_maps(parts, r)
    h, w = grouped(all_ssd_states(A, signals), 2), weights(signals)
    generator = torch.Generator().manual_seed(5)
    tokens = signals.C.flatten(0, 1)
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):
        C = tokens[torch.randperm(len(tokens), generator=generator)].view_as(signals.C)
        error = torch.einsum("blgn,blgpn->blgp", C - apply_map(B_map.mT, apply_map(C_map, C)), h)
        squares += (w * error.square()).sum((0, 1, 3)) / len(tokens) / 20
    expected = torch.stack([part.hsv[r:].square().sum() for part in parts])
    torch.testing.assert_close(squares, expected, rtol=0.02, atol=0)


def test_maps_are_dual():
    A, signals = ssd_layer()
    parts = balancings(instantaneous_sums(signals, A))
    B_map, C_map = balanced_maps(parts, 8)
    torch.testing.assert_close(B_map @ C_map.mT, torch.eye(8).double().expand(2, -1, -1))


def test_maps_of_a_group_with_fewer_directions_end_in_zeros():
    full = torch.eye(4, dtype=torch.float64)
    poor = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    B_map, C_map = balanced_maps([balance(full, full), balance(poor, full)], 3)
    assert (B_map[0].norm(dim=1) > 0).all()
    for maps in (B_map, C_map):
        assert torch.equal(maps[1].norm(dim=1) > 0, torch.tensor([True, True, False]))


def test_the_quadratic_form_is_the_error_of_leaving_states_out():
    A, signals = ssd_layer()
    M = instantaneous_sums(signals, A)["M"][1]
    gone = torch.tensor([0, 3, 4])
    h = grouped(all_ssd_states(A, signals), 2)[:, :, 1]
    error = torch.einsum("bln,blpn->blp", signals.C[:, :, 1][..., gone], h[..., gone])
    expected = (weights(signals)[:, :, 1] * error.square()).sum()
    torch.testing.assert_close(M[gone][:, gone].sum(), expected)


def test_selection_beats_random_and_separate_choices():
    ratios, separate = [], 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        factor = normal(12, 12, generator=generator) * torch.linspace(0, -3, 12).exp()
        M = factor.T @ factor

        def loss(kept, M=M):
            gone = torch.ones(12, dtype=torch.bool).index_fill(0, kept, False)
            return float(M[gone][:, gone].sum())

        kept = select_states(M, 5)
        assert len(kept) == 5
        assert torch.equal(kept, kept.sort().values)
        random = [loss(torch.randperm(12, generator=generator)[:5]) for _ in range(50)]
        ratios.append(loss(kept) / (sum(random) / 50))
        separate += loss(kept) <= loss(M.diagonal().topk(5).indices)
    assert max(ratios) < 0.3
    assert sum(ratios) / len(ratios) < 0.12
    assert separate >= 9


def test_selection_sees_states_that_cancel():
    """Large outputs that cancel matter less together than a small one; no score of single states could tell."""
    h = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    outputs = torch.stack([h[:, 0], -h[:, 0] + 0.01 * h[:, 1], 0.5 * h[:, 1]], 1)
    assert select_states(outputs.T @ outputs, 1).tolist() == [2]


def test_refinement_lowers_the_error_where_c_depends_on_the_state():
    A, signals = ssd_layer(batch=8, length=60)
    h = grouped(all_ssd_states(A, signals), 2)
    dependent = type(signals)(signals.x, signals.dt, signals.B, signals.C + 20 * h.mean(3), signals.weight)
    sums = instantaneous_sums(dependent, A)
    B_map, C_map = balanced_maps(balancings(sums), 3)
    C, S = ssd_token_moments(dependent, A, 2)
    assert C.shape == (2, 8 * 30, 8)

    def loss(group, B_map, C_map):
        error = dependent.C[:, :, group] - dependent.C[:, :, group] @ C_map.T @ B_map
        outputs = torch.einsum("bln,blpn->blp", error, h[:, :, group])
        return float((weights(dependent)[:, :, group] * outputs.square()).sum())

    for group in range(2):
        gramians = sums["P"][group] / sums["states"], sums["Q"][group] / sums["tokens"]
        start = B_map[group], C_map[group]
        refined = refined_maps(*start, C[group], S[group], *gramians, shrinkage=0.1)
        assert loss(group, *refined) < 0.95 * loss(group, *start)
        # with nothing but the objective of balancing there is nothing to gain
        same = refined_maps(*start, C[group], S[group], *gramians, shrinkage=1.0)
        torch.testing.assert_close(same[0].mT @ same[1], start[0].mT @ start[1], rtol=1e-3, atol=1e-3)
