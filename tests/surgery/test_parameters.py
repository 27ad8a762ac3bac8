import torch
from torch import nn

from hf_compressm.surgery import resize_parameter_


def test_a_parameter_changes_shape_and_stays_the_same_object():
    layer = nn.Linear(4, 6)
    param = layer.weight
    param._no_weight_decay = True
    param.grad = torch.ones_like(param)
    assert resize_parameter_(param, torch.arange(8.0).reshape(2, 4)) is param
    assert layer.weight is param
    assert param.grad is None
    assert param._no_weight_decay
    assert torch.equal(param, torch.arange(8.0).reshape(2, 4))


def test_backward_works_while_an_old_graph_is_alive():
    layer = nn.Linear(4, 6, bias=False)
    x = torch.randn(3, 4)
    old = layer(x).sum()  # caches the gradient accumulator of the old shape
    seen = []
    layer.weight.register_hook(lambda grad: seen.append(grad.shape))
    resize_parameter_(layer.weight, torch.randn(2, 4))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 4))
    assert old.requires_grad
    assert seen == [torch.Size([2, 4])]


def test_the_dtype_is_kept_and_the_data_copied():
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    data = torch.ones(5, dtype=torch.float64)
    resize_parameter_(param, data)
    data.zero_()
    assert param.dtype == torch.bfloat16
    assert torch.equal(param, torch.ones(5, dtype=torch.bfloat16))
