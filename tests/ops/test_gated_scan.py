"""The scan of a Mamba block with its surroundings, in PyTorch and in compiled loops."""

import pytest
import torch
from ops.scans import (
    assert_same,
    count_graph_nodes,
    gated_inputs,
    gated_outputs_and_gradients,
    largest_allocation,
    to_float32,
)

from hf_compressm.ops import gated_scan, gated_scan_reference

pytestmark = pytest.mark.usefixtures("loops")

SHAPES = [
    (2, 70, 5, 3),
    (1, 2, 1, 1),
    (3, 32, 4, 2),
    (2, 33, 129, 5),
    (1, 17, 300, 4),
    (4, 16, 3, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape):
    inputs = gated_inputs(*shape)
    expected = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), expected, 1e-12)
    single = gated_outputs_and_gradients(gated_scan, to_float32(inputs))
    assert_same([x.double() for x in single], expected, 1e-5)


def test_gradcheck():
    assert torch.autograd.gradcheck(gated_scan, gated_inputs(2, 7, 3, 2))


@pytest.mark.parametrize(("smallest", "largest"), [(-14, -14), (50, 50), (-14, 50), (-200, 200)])
def test_extreme_steps(smallest, largest):
    inputs = gated_inputs(2, 200, 4, 3, smallest, largest)
    expected = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), expected, 1e-10)
    single = gated_outputs_and_gradients(gated_scan, to_float32(inputs))
    assert_same([x.double() for x in single], expected, 1e-5)


@pytest.mark.parametrize("gate", [-200.0, -20.0, 200.0])
def test_extreme_gates(gate):
    inputs = gated_inputs(2, 20, 4, 3)
    with torch.no_grad():
        inputs[6].fill_(gate)
    expected = gated_outputs_and_gradients(gated_scan_reference, to_float32(inputs))
    actual = gated_outputs_and_gradients(gated_scan, to_float32(inputs))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5 * e.abs().max().item() + 1e-35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_leaves_the_state_exactly_as_it_is(dtype):
    inputs = [x.detach().to(dtype) for x in gated_inputs(2, 40, 5, 3)]
    inputs[1].fill_(-1e4)
    assert torch.equal(gated_scan(*inputs)[1], inputs[-1])


def test_long_sequence():
    inputs = gated_inputs(1, 16384, 3, 2, -14, 50)
    exact = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), exact, 1e-10)
    assert_same([x.double() for x in gated_outputs_and_gradients(gated_scan, to_float32(inputs))], exact, 1e-5)


def test_no_initial_state_is_a_zero_initial_state():
    *inputs, h0 = gated_inputs(2, 40, 3, 2)
    for actual, expected in zip(gated_scan(*inputs), gated_scan(*inputs, torch.zeros_like(h0)), strict=True):
        assert torch.equal(actual, expected)
    gradients = torch.autograd.grad(gated_scan(*inputs)[0].sum(), inputs)
    assert_same(gradients, torch.autograd.grad(gated_scan_reference(*inputs)[0].sum(), inputs), 1e-12)


def test_pieces_joined_by_the_state_equal_the_whole():
    u, delta, A, B, C, D, z, bias, state = gated_inputs(2, 75, 4, 3)
    y, h_last = gated_scan(u, delta, A, B, C, D, z, bias, state)
    outputs = []
    for u_, delta_, B_, C_, z_ in zip(*(x.split([1, 40, 3, 31], dim=1) for x in (u, delta, B, C, z)), strict=True):
        out, state = gated_scan(u_, delta_, A, B_, C_, D, z_, bias, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, h_last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 0, 3, 4), (0, 5, 3, 4)], ids=str)
def test_nothing_to_scan(shape):
    inputs = gated_inputs(*shape)
    y, h_last, *gradients = gated_outputs_and_gradients(gated_scan, inputs)
    assert y.shape == shape[:3]
    assert torch.equal(h_last, inputs[-1])
    assert not any(gradients[position].any() for position in (2, 5, 7))  # of A, D and the bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_in_float32_in_lower_precision(dtype):
    inputs = to_float32(gated_inputs(2, 60, 4, 3))
    low = [x.detach().to(dtype).requires_grad_() if x.dim() == 3 else x for x in inputs[:-1]]
    low[2] = inputs[2]
    wide = [x.detach().float().requires_grad_() for x in low]
    (y, h_last), expected = gated_scan(*low), gated_scan_reference(*wide)
    assert (y.dtype, h_last.dtype) == (dtype, torch.float32)
    assert_same([h_last], expected[1:], 1e-5)
    assert_same([y.float()], expected[:1], 1e-2)
    weight = torch.randn(y.shape).to(dtype)
    actual = torch.autograd.grad(y, low, weight)
    assert [x.dtype for x in actual] == [x.dtype for x in low]
    assert_same([x.float() for x in actual], torch.autograd.grad(expected[0], wide, weight.float()), 2e-2)


@pytest.mark.parametrize("length", [1, 60])
def test_autocast_does_not_reach_the_state(length):
    inputs = to_float32(gated_inputs(2, length, 4, 3))
    plain = gated_outputs_and_gradients(gated_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = gated_outputs_and_gradients(gated_scan, inputs)
    for actual, expected in zip(automatic, plain, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("position", range(1, 9))
def test_u_says_what_all_are_computed_in(length, position):
    inputs = [x.detach().float() for x in gated_inputs(2, length, 4, 3)]
    expected = gated_scan_reference(*inputs)
    inputs[position] = inputs[position].double()
    assert_same(gated_scan(*inputs), expected, 1e-5)


def test_parts_of_wider_rows():
    """As in a mixer, where the gate is half of a projection, and B and C are parts of another."""
    u, delta, A, B, C, D, z, bias, _ = (x.detach() for x in gated_inputs(2, 40, 4, 3))
    xz, bc = torch.cat([u, z], -1).requires_grad_(), torch.cat([B, C], -1).requires_grad_()
    weight = torch.randn(u.shape, dtype=torch.float64)

    def run(scan, x):
        u, z = x[0].chunk(2, -1)
        B, C = x[1].chunk(2, -1)
        y = scan(u, delta, A, B, C, D, z, bias)[0]
        return [y, *torch.autograd.grad(y, x, weight)]

    assert_same(run(gated_scan, [xz, bc]), run(gated_scan_reference, [xz, bc]), 1e-12)
    transposed = [x.detach().mT.contiguous().mT.requires_grad_() for x in (xz, bc)]
    assert_same(run(gated_scan, transposed), run(gated_scan_reference, [xz, bc]), 1e-12)


def test_compiles_without_graph_breaks_and_without_unrolling():
    inputs = to_float32(gated_inputs(2, 300, 4, 3))
    nodes, outputs = count_graph_nodes(gated_scan, inputs)
    assert nodes < 60
    assert_same(outputs, gated_scan(*inputs), 1e-6)
    torch._dynamo.reset()


def test_compiled_gradients_equal_eager_ones():
    inputs = to_float32(gated_inputs(2, 50, 4, 3))
    compiled = torch.compile(gated_scan, backend="aot_eager", fullgraph=True)
    assert_same(gated_outputs_and_gradients(compiled, inputs), gated_outputs_and_gradients(gated_scan, inputs), 1e-6)
    torch._dynamo.reset()


def test_never_holds_the_states_of_the_whole_sequence():
    inputs = to_float32(gated_inputs(2, 640, 32, 64))
    largest = largest_allocation(lambda: gated_outputs_and_gradients(gated_scan, inputs))
    assert 2 * 640 * 64 <= largest <= 2 * 640 * 32 * 64 // 10


def replaced(position, value):
    inputs = gated_inputs(2, 10, 3, 4)
    inputs[position] = value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (replaced(0, torch.zeros(2, 10)), r"expected u \(batch, L, D\)"),
        (replaced(1, torch.zeros(2, 10, 4)), r"delta of shape \(2, 10, 3\), found \(2, 10, 4\)"),
        (replaced(4, torch.zeros(2, 9, 4)), r"C of shape \(2, 10, 4\)"),
        (replaced(5, torch.zeros(4)), r"D of shape \(3,\), found \(4,\)"),
        (replaced(6, torch.zeros(2, 10, 1)), r"z of shape \(2, 10, 3\), found \(2, 10, 1\)"),
        (replaced(7, torch.zeros(1)), r"delta_bias of shape \(3,\), found \(1,\)"),
        (replaced(8, torch.zeros(2, 4, 3)), r"h0 of shape \(2, 3, 4\), found \(2, 4, 3\)"),
    ],
)
def test_bad_arguments(inputs, message):
    with pytest.raises(ValueError, match=message):
        gated_scan(*inputs)
