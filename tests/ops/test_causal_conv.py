import pytest
import torch
import torch.nn.functional as F
from ops.scans import assert_same

from hf_compressm.ops import causal_conv


def make_inputs(batch, length, channels, size, dtype=torch.float64):
    shapes = [(batch, length, channels), (channels, size), (channels,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def silu_behind(x, weight, bias=None):
    return causal_conv(x, weight, bias, activation="silu")


def reference(x, weight, bias=None):
    size = weight.shape[1]
    return F.conv1d(x.mT, weight[:, None], bias, padding=size - 1, groups=len(weight))[..., : x.shape[1]].mT


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 5, 4), (1, 1, 1, 1), (3, 2, 4, 4), (2, 7, 3, 1), (1, 3, 2, 6)], ids=str)
def test_equals_conv1d(shape, with_bias):
    inputs = make_inputs(*shape)[: 3 if with_bias else 2]
    outputs = [conv(*inputs) for conv in (causal_conv, reference)]
    weight = torch.randn_like(outputs[0])
    ours, theirs = ([y, *torch.autograd.grad(y, inputs, weight)] for y in outputs)
    assert_same(ours, theirs, 1e-13)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 150, 4), (1, 1, 1, 1), (3, 2, 4, 4), (2, 7, 3, 1), (1, 3, 2, 6)], ids=str)
def test_silu_behind_it(loops, shape, with_bias):
    inputs = make_inputs(*shape)[: 3 if with_bias else 2]
    outputs = [silu_behind(*inputs), F.silu(reference(*inputs))]
    weight = torch.randn_like(outputs[0])
    ours, theirs = ([y, *torch.autograd.grad(y, inputs, weight)] for y in outputs)
    assert_same(ours, theirs, 1e-13)
    single = [x.detach().float().requires_grad_() for x in inputs]
    y = silu_behind(*single)
    assert_same([x.double() for x in (y, *torch.autograd.grad(y, single, weight.float()))], theirs, 1e-6)


def test_gradcheck(loops):
    assert torch.autograd.gradcheck(causal_conv, make_inputs(2, 6, 3, 4))
    assert torch.autograd.gradcheck(silu_behind, make_inputs(2, 6, 3, 4))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)], ids=str)
def test_nothing_to_convolve(loops, shape):
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    y = silu_behind(x, weight)
    assert y.shape == shape
    assert not torch.autograd.grad(y.sum(), weight)[0].any()


def test_compiles_without_graph_breaks(loops):
    inputs = make_inputs(2, 9, 6, 4, torch.float32)
    compiled = torch.compile(silu_behind, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(compiled, silu_behind(*inputs))
    torch._dynamo.reset()


def test_views_of_a_larger_tensor():
    x, weight, bias = make_inputs(2, 9, 6, 4)
    outputs = causal_conv(x[..., :3], weight[:3], bias[:3])
    assert_same([outputs], [reference(x[..., :3], weight[:3], bias[:3])], 1e-13)
    strided = x.detach().mT.contiguous().mT
    assert_same([causal_conv(strided, weight, bias)], [reference(x, weight, bias)], 1e-13)


def test_silu_behind_views_of_a_larger_tensor(loops):
    x, weight, bias = make_inputs(2, 9, 6, 4)
    for view in (x[..., :3], x[..., 2:5], x[:, 2:, :3], x[..., ::2], x.detach().mT.contiguous().mT[..., :3], x[:1]):
        size = view.shape[2]
        expected = F.silu(reference(view, weight[:size], bias[:size]))
        assert_same([silu_behind(view, weight[:size], bias[:size])], [expected], 1e-13)
    repeated = x[:, :1].expand(-1, 9, -1)
    assert_same([silu_behind(repeated, weight, bias)], [F.silu(reference(repeated, weight, bias))], 1e-13)


def test_sums_of_lower_precision_are_in_float32(loops):
    x, weight, bias = make_inputs(2, 9, 6, 4, torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    y = causal_conv(low, weight, bias)
    assert torch.equal(y, causal_conv(low.float(), weight, bias).bfloat16())
    behind = silu_behind(low, weight, bias)
    assert_same([behind.float()], [F.silu(reference(low.float(), weight, bias))], 1e-2)
    assert [x.dtype for x in (behind, *torch.autograd.grad(behind.sum(), [low, weight]))] == [
        *(torch.bfloat16, torch.bfloat16, torch.float32)
    ]
    assert torch.autograd.grad(y.sum(), [low, weight])[0].dtype == torch.bfloat16


def test_operator_registration():
    inputs = make_inputs(2, 9, 6, 4, torch.float32)
    for arguments in (inputs, (*inputs[:2], None)):
        torch.library.opcheck(torch.ops.hf_compressm.causal_conv.default, arguments)
    x, weight, bias = inputs
    arguments = (x, weight.detach().t().contiguous().requires_grad_(), bias)
    torch.library.opcheck(torch.ops.hf_compressm.causal_conv_silu.default, arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 9), (9, 4), (9,)), r"expected x \(batch, L, D\) and weight \(D, k\); found \(2, 9\)"),
        (((2, 9, 3), (4, 4), (4,)), r"found \(2, 9, 3\) and \(4, 4\)"),
        (((2, 9, 3), (3, 4), (4,)), r"bias of shape \(3,\), found \(4,\)"),
    ],
)
def test_bad_arguments(shapes, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(*map(torch.zeros, shapes))


def test_another_activation():
    with pytest.raises(ValueError, match="activation None or \"silu\", found 'gelu'"):
        causal_conv(*make_inputs(1, 2, 3, 4), activation="gelu")
