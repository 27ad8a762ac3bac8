import sys

import pytest
import torch
from ops.scans import make_lru_inputs as make_inputs
from ops.scans import make_mask, outputs_and_gradients

from hf_compressm.ops import lru_scan, lru_scan_reference

lru = sys.modules[lru_scan.__module__]
SHAPES = [  # batch, L, N, H, P, chunk_size
    (2, 70, 5, 3, 4, 32),
    (1, 1, 1, 1, 1, 32),
    (3, 32, 4, 2, 2, 32),
    (2, 33, 1, 1, 3, 8),
    (1, 17, 6, 4, 1, 1),
    (4, 50, 3, 1, 2, 64),
]
MASKS = ["none", "all real", "left", "right", "middle", "random", "empty row", "nothing"]


@pytest.fixture
def convolution(monkeypatch):
    """Every scan that may be a convolution is one; the calls."""
    calls = []
    convolve = lru.convolve
    monkeypatch.setattr(lru, "convolution_is_faster", lambda *sizes: True)
    monkeypatch.setattr(lru, "convolve", lambda *args: calls.append(args) or convolve(*args))
    return calls


def convolution_and_gradients(scan, inputs, mask=None):
    """Outputs and gradients without initial and final state."""
    y, state = scan(*inputs, mask=mask, final_state=False)
    assert state is None
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * weight).sum(), inputs)]


def assert_same(actual, expected, rtol):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert (a - e).abs().max() <= rtol * (1 + e.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_reference(shape, kind):
    *shape, chunk_size = shape
    inputs, mask = make_inputs(*shape), make_mask(kind, *shape[:2])
    expected = outputs_and_gradients(lru_scan_reference, inputs, mask)
    assert_same(outputs_and_gradients(lru_scan, inputs, mask, chunk_size=chunk_size), expected, 1e-11)


@pytest.mark.parametrize("kind", ["none", "random"])
def test_gradcheck(kind):
    shape = (2, 7, 3, 2, 2)
    inputs, mask = make_inputs(*shape), make_mask(kind, *shape[:2])
    assert torch.autograd.gradcheck(lambda *args: lru_scan(*args, mask=mask, chunk_size=3), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_convolution_equals_the_reference(convolution, shape, kind):
    *shape, _ = shape
    (*inputs, _), mask = make_inputs(*shape), make_mask(kind, *shape[:2])
    expected = convolution_and_gradients(lru_scan_reference, inputs, mask)
    assert_same(convolution_and_gradients(lru_scan, inputs, mask), expected, 1e-12)
    single = [x.detach().float().requires_grad_() for x in inputs]
    assert_same([x.double() for x in convolution_and_gradients(lru_scan, single, mask)], expected, 1e-5)
    assert len(convolution) == 2


@pytest.mark.parametrize("kind", ["none", "random"])
def test_convolution_gradcheck(convolution, kind):
    *inputs, _ = make_inputs(2, 7, 3, 2, 2)
    mask = make_mask(kind, 2, 7)
    assert torch.autograd.gradcheck(lambda *args: lru_scan(*args, mask=mask, final_state=False)[0], inputs)


@pytest.mark.parametrize("radius", [1e-30, 1e-3, 1 - 1e-7, 1.0])
def test_convolution_of_a_long_sequence_in_float32(convolution, radius):
    *inputs, _ = make_inputs(1, 16384, 4, 2, 2, radius=radius)
    single = [x.detach().float().requires_grad_() for x in inputs]
    # From the rounded inputs: at these lengths the powers of an eigenvalue of size 1 feel its rounding.
    exact = convolution_and_gradients(lru_scan, [x.detach().double().requires_grad_() for x in single])
    for actual, expected in zip(convolution_and_gradients(lru_scan, single), exact, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("content", [1e30, float("nan"), float("inf")])
def test_convolution_ignores_the_content_of_masked_steps(convolution, content):
    *inputs, _ = make_inputs(3, 40, 4, 2, 2)
    mask = make_mask("random", 3, 40)
    clean = convolution_and_gradients(lru_scan, inputs, mask)
    with torch.no_grad():
        inputs[0][~mask] = content
    for actual, expected in zip(convolution_and_gradients(lru_scan, inputs, mask), clean, strict=True):
        assert torch.equal(actual, expected)


def test_convolution_of_nothing(convolution):
    *inputs, _ = make_inputs(2, 0, 3, 2, 4)
    y, *gradients = convolution_and_gradients(lru_scan, inputs)
    assert y.shape == (2, 0, 4)
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_is_in_float32_in_lower_precision(convolution, dtype):
    u, *weights, _ = make_inputs(2, 60, 4, 3, 2, dtype=torch.float32)
    low = u.detach().to(dtype).requires_grad_()
    y, _ = lru_scan(low, *weights, final_state=False)
    assert torch.equal(y, lru_scan(low.float(), *weights, final_state=False)[0].to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = lru_scan(u, *weights, final_state=False)[0]
    assert torch.equal(automatic, lru_scan(u, *weights, final_state=False)[0])


def test_convolution_operator_registration():
    u, lam_re, lam_im, B_re, B_im, C_re, C_im, _ = make_inputs(2, 40, 3, 2, 4, dtype=torch.float32)
    packed = [torch.stack([lam_re, lam_im], -1), torch.cat([B_re, B_im]), torch.cat([C_re, C_im], 1)]
    arguments = [x.detach().clone().requires_grad_() for x in (u, *packed)]
    torch.library.opcheck(torch.ops.hf_compressm.lru_convolution.default, arguments)


def test_convolution_compiles_without_graph_breaks(convolution):
    *inputs, _ = make_inputs(2, 50, 4, 3, 2, dtype=torch.float32)
    mask = make_mask("left", 2, 50)
    compiled = torch.compile(lru_scan, backend="aot_eager", fullgraph=True)
    expected = convolution_and_gradients(lru_scan, inputs, mask)
    assert_same(convolution_and_gradients(compiled, inputs, mask), expected, 1e-6)


def test_convolution_where_it_is_faster_and_no_state_is_asked_for():
    faster, slower = (50, 784, 256, 8, 8), (4, 1024, 384, 512, 512)  # by a factor of ten, and of fifty
    assert lru.convolution_is_faster(*faster)
    assert not lru.convolution_is_faster(*slower)
    *inputs, h0 = make_inputs(2, 40, 64, 1, 1)
    assert lru.convolution_is_faster(2, 40, 64, 1, 1)
    y, _ = lru_scan(*inputs, final_state=False)
    same, h_last = lru_scan(*inputs)
    assert not torch.equal(y, same)  # another rounding
    assert_same([y], [same], 1e-12)
    assert torch.equal(lru_scan(*inputs, torch.zeros_like(h0), final_state=False)[0], same)
    assert h_last.shape == h0.shape


@pytest.mark.parametrize("radius", [1e-30, 1e-3, 1 - 1e-7, 1.0])
def test_extreme_eigenvalues(radius):
    inputs = make_inputs(2, 200, 4, 3, 2, radius=radius)
    expected = outputs_and_gradients(lru_scan_reference, inputs, None)
    actual = outputs_and_gradients(lru_scan, inputs, None)
    assert all(x.isfinite().all() for x in actual)
    assert_same(actual, expected, 1e-10)


def test_long_sequence_in_float32_is_close_to_float64():
    inputs = make_inputs(2, 4096, 8, 2, 2, radius=0.999)
    exact = outputs_and_gradients(lru_scan_reference, inputs, None)
    single = [x.detach().float().requires_grad_() for x in inputs]
    actual = outputs_and_gradients(lru_scan, single, None)
    assert_same([x.double() for x in actual], exact, 1e-4)


def test_no_initial_state_is_a_zero_initial_state():
    *inputs, h0 = make_inputs(2, 40, 3, 2, 2)
    for kind in ("none", "left"):
        mask = make_mask(kind, 2, 40)
        for actual, expected in zip(
            lru_scan(*inputs, None, mask), lru_scan(*inputs, torch.zeros_like(h0), mask), strict=True
        ):
            assert torch.equal(actual, expected)


def test_pieces_joined_by_the_state_equal_the_whole():
    u, *weights, h0 = make_inputs(2, 75, 4, 3, 3)
    y, h_last = lru_scan(u, *weights, h0)
    outputs, state = [], h0
    for piece in u.split([1, 40, 3, 31], dim=1):
        out, state = lru_scan(piece, *weights, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, h_last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("content", [1e30, float("nan"), float("inf")])
def test_content_of_masked_steps_changes_nothing(content):
    inputs = make_inputs(3, 40, 4, 2, 2)
    mask = make_mask("random", 3, 40)
    clean = outputs_and_gradients(lru_scan, inputs, mask)
    with torch.no_grad():
        inputs[0][~mask] = content
    for actual, expected in zip(outputs_and_gradients(lru_scan, inputs, mask), clean, strict=True):
        assert torch.equal(actual, expected)
    assert not clean[2][~mask].any()


def test_empty_sequence_returns_the_initial_state():
    inputs = make_inputs(2, 0, 3, 2, 4)
    for scan in (lru_scan, lru_scan_reference):
        y, h_last = scan(*inputs)
        assert y.shape == (2, 0, 4)
        assert torch.equal(h_last, inputs[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_in_float32_in_lower_precision(dtype):
    inputs = make_inputs(2, 60, 4, 3, 2, dtype=torch.float32)
    low = [inputs[0].to(dtype), *inputs[1:]]
    y, h_last = lru_scan(*low)
    expected_y, expected_h = lru_scan(low[0].float(), *inputs[1:])
    assert (y.dtype, h_last.dtype) == (dtype, torch.float32)
    assert torch.equal(h_last, expected_h)
    assert torch.equal(y, expected_y.to(dtype))


def test_autocast_does_not_reach_the_state():
    inputs = make_inputs(2, 60, 4, 3, 2, dtype=torch.float32)
    plain = outputs_and_gradients(lru_scan, inputs, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = outputs_and_gradients(lru_scan, inputs, None)
    for actual, expected in zip(automatic, plain, strict=True):
        assert torch.equal(actual, expected)


def test_strided_inputs():
    u, *rest = make_inputs(2, 40, 4, 3, 2)
    strided = u.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_same(
        outputs_and_gradients(lru_scan, [strided, *rest], None),
        outputs_and_gradients(lru_scan, [u, *rest], None),
        1e-13,
    )


@pytest.mark.parametrize("kind", ["none", "left"])
def test_operator_registration(kind):
    *inputs, h0 = make_inputs(2, 40, 3, 2, 2, dtype=torch.float32)
    u, lam_re, lam_im, B_re, B_im, C_re, C_im = (x.detach() for x in inputs)
    lam = torch.stack([lam_re, lam_im], -1).requires_grad_()
    w_in, w_out = torch.cat([B_re, B_im]).requires_grad_(), torch.cat([C_re, C_im], 1).requires_grad_()
    for state in (None, h0):
        arguments = (u.clone().requires_grad_(), lam, w_in, w_out, state, make_mask(kind, 2, 40), 16)
        torch.library.opcheck(torch.ops.hf_compressm.lru_scan.default, arguments)


def test_compiles_without_graph_breaks_and_without_unrolling():
    inputs, mask = make_inputs(2, 300, 4, 3, 2, dtype=torch.float32), make_mask("left", 2, 300)
    graphs = []

    def count_nodes(graph, example_inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(lru_scan, backend=count_nodes, fullgraph=True)
    for actual, expected in zip(compiled(*inputs, mask=mask), lru_scan(*inputs, mask=mask), strict=True):
        assert torch.equal(actual, expected)
    assert len(graphs) == 1
    assert graphs[0] < 60


def test_compiled_gradients_equal_eager_ones():
    inputs, mask = make_inputs(2, 50, 4, 3, 2, dtype=torch.float32), make_mask("left", 2, 50)
    compiled = torch.compile(lru_scan, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(compiled, inputs, mask), outputs_and_gradients(lru_scan, inputs, mask), 1e-6)


def replaced(position, value):
    inputs = make_inputs(2, 10, 3, 2, 4)
    inputs[position] = value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (replaced(0, torch.zeros(2, 10)), {}, r"expected u \(batch, L, H\)"),
        (replaced(2, torch.zeros(4)), {}, r"lam_im of shape \(3,\), found \(4,\)"),
        (replaced(3, torch.zeros(3, 5)), {}, r"B_re of shape \(3, 2\), found \(3, 5\)"),
        (replaced(6, torch.zeros(4, 5)), {}, r"C_im of shape \(4, 3\), found \(4, 5\)"),
        (replaced(7, torch.zeros(1, 3, 2)), {}, r"h0 of shape \(2, 3, 2\), found \(1, 3, 2\)"),
        (replaced(0, torch.zeros(2, 10, 2)), {"mask": torch.ones(2, 9, dtype=torch.bool)}, r"mask of shape \(2, 10\)"),
        (replaced(0, torch.zeros(2, 10, 2)), {"mask": torch.ones(2, 10)}, "mask of dtype torch.bool"),
        (replaced(0, torch.zeros(2, 10, 2)), {"chunk_size": 0}, "chunk_size >= 1"),
    ],
)
def test_bad_arguments(inputs, options, message):
    for scan in (lru_scan, lru_scan_reference):
        with pytest.raises(ValueError, match=message):
            scan(*inputs, **options)


def test_sequences_of_any_length_share_a_compiled_graph():
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *inputs: lru_scan(*inputs, final_state=False), backend=counting, dynamic=True)
    for length in (40, 41, 55, 64, 81, 90):
        compiled(*make_inputs(2, length, 4, 3, 2, dtype=torch.float32)[:-1])
    assert len(graphs) == 1
