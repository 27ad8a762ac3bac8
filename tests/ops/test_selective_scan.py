import sys

import pytest
import torch
import torch.nn.functional as F
from ops.scans import (
    MASKS,
    assert_same,
    count_graph_nodes,
    largest_allocation,
    make_mask,
    outputs_and_gradients,
    steps_between,
    to_float32,
)
from transformers import MambaConfig
from transformers.models.mamba import modeling_mamba

from hf_compressm.ops import selective_scan, selective_scan_reference

SHAPES = [  # batch, L, D, n, chunk_size
    (2, 70, 5, 3, 32),
    (1, 1, 1, 1, 16),
    (3, 32, 4, 2, 16),
    (2, 33, 1, 5, 8),
    (1, 17, 6, 4, 1),
    (4, 50, 3, 1, 64),
]


def make_inputs(batch, length, channels, n, smallest=1e-2, largest=2.0):
    """u, delta, A, B, C, h0 in float64."""
    shapes = [(batch, length, n), (batch, length, n), (batch, channels, n)]
    tensors = [torch.randn(batch, length, channels, dtype=torch.float64)]
    tensors += [steps_between(smallest, largest, batch, length, channels)]
    tensors += [-4 * torch.rand(channels, n, dtype=torch.float64)]
    tensors += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_reference(shape, kind):
    *shape, chunk_size = shape
    inputs, mask = make_inputs(*shape), make_mask(kind, *shape[:2])
    expected = outputs_and_gradients(selective_scan_reference, inputs, mask)
    actual = outputs_and_gradients(selective_scan, inputs, mask, chunk_size=chunk_size)
    assert_same(actual, expected, 1e-12)
    single = outputs_and_gradients(selective_scan, to_float32(inputs), mask, chunk_size=chunk_size)
    assert_same([x.double() for x in single], expected, 1e-5)


@pytest.mark.parametrize("states", [1, 7, 12, 40, 10**6])
def test_blocks_of_the_batch_and_of_the_channels_change_nothing(monkeypatch, states):
    inputs, mask = make_inputs(3, 40, 7, 4), make_mask("random", 3, 40)
    expected = outputs_and_gradients(selective_scan_reference, inputs, mask)
    monkeypatch.setattr(sys.modules[selective_scan.__module__], "BLOCK_STATES", states)
    assert_same(outputs_and_gradients(selective_scan, inputs, mask), expected, 1e-12)


@pytest.mark.parametrize("kind", ["none", "random"])
def test_gradcheck(kind):
    inputs, mask = make_inputs(2, 7, 3, 2), make_mask(kind, 2, 7)
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, mask=mask, chunk_size=3), inputs)


@pytest.mark.parametrize(("smallest", "largest"), [(1e-6, 1e-6), (50, 50), (1e-6, 50)])
def test_extreme_steps(smallest, largest):
    inputs = make_inputs(2, 200, 4, 3, smallest, largest)
    expected = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), expected, 1e-10)
    single = outputs_and_gradients(selective_scan, to_float32(inputs))
    assert_same([x.double() for x in single], expected, 1e-5)


def test_zero_steps_have_gradients():
    inputs = make_inputs(2, 20, 3, 2)
    with torch.no_grad():
        inputs[1][:, ::3] = 0
    expected = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), expected, 1e-12)


def test_long_sequence():
    inputs = make_inputs(1, 16384, 3, 2, 1e-6, 50)
    exact = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), exact, 1e-10)
    assert_same([x.double() for x in outputs_and_gradients(selective_scan, to_float32(inputs))], exact, 1e-5)


def test_no_initial_state_is_a_zero_initial_state():
    *inputs, h0 = make_inputs(2, 40, 3, 2)
    for actual, expected in zip(selective_scan(*inputs), selective_scan(*inputs, torch.zeros_like(h0)), strict=True):
        assert torch.equal(actual, expected)
    gradients = torch.autograd.grad(selective_scan(*inputs)[0].sum(), inputs)
    assert_same(gradients, torch.autograd.grad(selective_scan_reference(*inputs)[0].sum(), inputs), 1e-12)


def test_pieces_joined_by_the_state_equal_the_whole():
    u, delta, A, B, C, state = make_inputs(2, 75, 4, 3)
    y, h_last = selective_scan(u, delta, A, B, C, state)
    outputs = []
    for u_, delta_, B_, C_ in zip(*(x.split([1, 40, 3, 31], dim=1) for x in (u, delta, B, C)), strict=True):
        out, state = selective_scan(u_, delta_, A, B_, C_, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, h_last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("content", [1e30, float("nan"), float("inf")])
def test_content_of_masked_steps_changes_nothing(content):
    inputs, mask = make_inputs(3, 40, 4, 2), make_mask("random", 3, 40)
    clean = outputs_and_gradients(selective_scan, inputs, mask)
    with torch.no_grad():
        for x in (inputs[0], inputs[1], inputs[3]):
            x[~mask] = content
    for actual, expected in zip(outputs_and_gradients(selective_scan, inputs, mask), clean, strict=True):
        assert torch.equal(actual, expected)
    assert not any(clean[position][~mask].any() for position in (2, 3, 5))


def test_masked_steps_are_as_if_absent():
    u, delta, A, B, C, h0 = make_inputs(1, 40, 4, 2)
    mask = make_mask("random", 1, 40)
    y, h_last = selective_scan(u, delta, A, B, C, h0, mask)
    kept = [x[:, mask[0]] for x in (u, delta, B, C)]
    expected_y, expected_h = selective_scan(kept[0], kept[1], A, kept[2], kept[3], h0)
    assert_same([y[:, mask[0]], h_last], [expected_y, expected_h], 1e-13)


def test_empty_sequence_returns_the_initial_state():
    inputs = make_inputs(2, 0, 3, 4)
    for scan in (selective_scan, selective_scan_reference):
        y, h_last = scan(*inputs)
        assert y.shape == (2, 0, 3)
        assert torch.equal(h_last, inputs[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_in_float32_in_lower_precision(dtype):
    u, delta, A, B, C, h0 = to_float32(make_inputs(2, 60, 4, 3))
    low = [x.detach().to(dtype).requires_grad_() for x in (u, delta, B, C)]
    y, h_last = selective_scan(low[0], low[1], A, low[2], low[3], h0)
    expected_y, expected_h = selective_scan(low[0].float(), low[1].float(), A, low[2].float(), low[3].float(), h0)
    assert (y.dtype, h_last.dtype) == (dtype, torch.float32)
    assert torch.equal(h_last, expected_h)
    assert torch.equal(y, expected_y.to(dtype))
    weight = torch.randn(y.shape).to(dtype)
    actual = torch.autograd.grad(y, low, weight)
    expected = torch.autograd.grad(expected_y, low, weight.float())
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_autocast_does_not_reach_the_state():
    inputs = to_float32(make_inputs(2, 60, 4, 3))
    plain = outputs_and_gradients(selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = outputs_and_gradients(selective_scan, inputs)
    for actual, expected in zip(automatic, plain, strict=True):
        assert torch.equal(actual, expected)


def test_strided_inputs():
    inputs = make_inputs(2, 40, 4, 3)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    assert_same(outputs_and_gradients(selective_scan, strided), outputs_and_gradients(selective_scan, inputs), 1e-13)


def test_operator_registration():
    u, delta, A, B, C, h0 = to_float32(make_inputs(2, 40, 3, 2))
    transposed = [x.detach().transpose(-1, -2).contiguous().requires_grad_() for x in (A, h0)]
    for state in (None, transposed[1]):
        arguments = (u, delta, transposed[0], B, C, state, 16)
        torch.library.opcheck(torch.ops.hf_compressm.selective_scan.default, arguments)


def test_compiles_without_graph_breaks_and_without_unrolling():
    inputs, mask = to_float32(make_inputs(2, 300, 4, 3)), make_mask("left", 2, 300)
    nodes, outputs = count_graph_nodes(selective_scan, inputs, mask=mask)
    assert nodes < 60
    for actual, expected in zip(outputs, selective_scan(*inputs, mask=mask), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_gradients_equal_eager_ones():
    inputs, mask = to_float32(make_inputs(2, 50, 4, 3)), make_mask("left", 2, 50)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    expected = outputs_and_gradients(selective_scan, inputs, mask)
    assert_same(outputs_and_gradients(compiled, inputs, mask), expected, 1e-6)


def test_never_holds_the_states_of_the_whole_sequence():
    inputs = to_float32(make_inputs(2, 640, 32, 64))
    largest = largest_allocation(lambda: outputs_and_gradients(selective_scan, inputs))
    assert 2 * 640 * 64 <= largest <= 2 * 640 * 32 * 64 // 10


def scan_for_transformers(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs):
    """`selective_scan` with the arguments of the scan that transformers' mixer calls."""
    assert delta_softplus
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    y, h_last = selective_scan(u, F.softplus(delta + delta_bias), A, B, C)
    y = (y + u * D).transpose(1, 2) * F.silu(z)
    return (y, h_last) if return_last_state else y


def test_equals_the_scan_of_transformers(monkeypatch):
    config = MambaConfig(hidden_size=12, state_size=5, num_hidden_layers=1, vocab_size=8, use_mambapy=False)
    mixer = modeling_mamba.MambaMixer(config, layer_idx=0).double()
    hidden = torch.randn(2, 37, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 37, 12, dtype=torch.float64)

    def run():
        out = mixer(hidden)
        return [out, *torch.autograd.grad(out, [hidden, *mixer.parameters()], weight)]

    stock = run()
    calls = []

    def ours(*args, **kwargs):
        calls.append(args)
        return scan_for_transformers(*args, **kwargs)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", ours)
    # transformers takes A, D and the bias of delta in float32 even in a float64 model; so do both sides here.
    assert_same(run(), stock, 1e-5)
    assert len(calls) == 1


def replaced(position, value):
    inputs = make_inputs(2, 10, 3, 4)
    inputs[position] = value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (replaced(0, torch.zeros(2, 10)), {}, r"expected u \(batch, L, D\)"),
        (replaced(1, torch.zeros(2, 10, 4)), {}, r"delta of shape \(2, 10, 3\), found \(2, 10, 4\)"),
        (replaced(2, torch.zeros(4, 4)), {}, r"A of shape \(3, 4\), found \(4, 4\)"),
        (replaced(3, torch.zeros(2, 10, 5)), {}, r"B of shape \(2, 10, 4\)"),
        (replaced(4, torch.zeros(2, 9, 4)), {}, r"C of shape \(2, 10, 4\)"),
        (replaced(5, torch.zeros(2, 4, 3)), {}, r"h0 of shape \(2, 3, 4\), found \(2, 4, 3\)"),
        (make_inputs(2, 10, 3, 4), {"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask of shape \(2, 10\)"),
        (make_inputs(2, 10, 3, 4), {"mask": torch.ones(2, 10)}, "mask of dtype torch.bool"),
        (make_inputs(2, 10, 3, 4), {"chunk_size": 0}, "chunk_size >= 1"),
    ],
)
def test_bad_arguments(inputs, options, message):
    for scan in (selective_scan, selective_scan_reference):
        with pytest.raises(ValueError, match=message):
            scan(*inputs, **options)
