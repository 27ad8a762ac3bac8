r"""The short depthwise convolution in front of a selective scan, with the channels last.

$$y_t = b + \sum_{i=0}^{k-1} w_i \odot x_{t-k+1+i}$$

with zeros before the first step, and the SiLU behind it. `torch.nn.functional.conv1d` has the time last, wants the
other layout copied, and its backward pass takes four times as long on a CPU.
"""

import torch
from torch.nn import functional as F

from . import fused
from ._common import state_dtype


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """Convolve each channel of `x (batch, L, D)` over time with its row of `weight (D, k)`; `bias (D,)`.

    The result has the dtype of `x`, the sum is at least float32. `activation` is None or "silu".

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"expected x (batch, L, D) and weight (D, k); found {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape {tuple(weight.shape[:1])}, found {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'expected activation None or "silu", found {activation!r}')
    dtype = state_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if activation is None:
        return _conv(x, weight, bias)
    if fused.usable(x.device):
        return _conv_silu(x, weight.t(), weight.new_zeros(len(weight)) if bias is None else bias)
    return F.silu(_conv(x, weight, bias))


@torch.library.custom_op("hf_compressm::causal_conv", mutates_args=())
def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    length, taps, wide = x.shape[1], weight.t().contiguous(), x.to(weight.dtype).contiguous()
    last = len(taps) - 1
    y = wide * taps[last] if bias is None else torch.addcmul(bias, wide, taps[last])
    for i, tap in enumerate(taps[:last]):
        delay = min(last - i, length)
        y[:, delay:].addcmul_(wide[:, : length - delay], tap)
    return y.to(x.dtype)


@_conv.register_fake
def _conv_fake(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_compressm::causal_conv_backward", mutates_args=())
def _conv_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias."""
    length, taps, dtype = x.shape[1], weight.t().contiguous(), x.dtype
    last = len(taps) - 1
    dy, x = (v.to(weight.dtype).contiguous() for v in (dy, x))
    dx, dtaps = dy * taps[last], torch.empty_like(taps)
    product = torch.empty_like(dx)
    for i, tap in enumerate(taps):
        delay = min(last - i, length)
        if i < last:
            dx[:, : length - delay].addcmul_(dy[:, delay:], tap)
        part = torch.mul(x[:, : length - delay], dy[:, delay:], out=product[:, : length - delay])
        torch.sum(part, (0, 1), out=dtaps[i])
    return dx.to(dtype), dtaps.t().contiguous(), dy.sum((0, 1))


@_conv_backward.register_fake
def _conv_backward_fake(dy, x, weight):
    return dy.new_empty(dy.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    dx, dweight, dbias = _conv_backward(dy, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None


_conv.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("hf_compressm::causal_conv_silu", mutates_args=())
def _conv_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """In one compiled loop; `weight (k, D)`. The backward pass computes the convolution again."""
    return fused.conv_forward(x, weight, bias).to(x.dtype)


@_conv_silu.register_fake
def _conv_silu_fake(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_compressm::causal_conv_silu_backward", mutates_args=())
def _conv_silu_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = fused.conv_backward(dy, x, weight, bias)
    return dx.to(x.dtype), dweight, dbias


@_conv_silu_backward.register_fake
def _conv_silu_backward_fake(dy, x, weight, bias):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_all_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_conv_silu.register_autograd(
    lambda ctx, dy: _conv_silu_backward(dy, *ctx.saved_tensors), setup_context=_save_all_for_backward
)
