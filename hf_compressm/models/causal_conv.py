"""The short causal convolution in front of a selective scan, with padding at any place and with a cache."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..ops import causal_conv


def causal_convolution(
    mixer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None, kernel: Callable
) -> torch.Tensor:
    """Convolve `x (batch, channels, L)` over time and apply the activation, as a stock Mamba mixer does.

    A convolution that simply reads zeros at padding would be wrong where padding stands between real tokens, as it
    does in a cache that goes on after right padding. So padding is moved in front of each row for the convolution.

    Args:
        mixer: has `conv1d`, `act`, `activation`, `conv_kernel_size` and `layer_idx`.
        mask: (batch, L), False at padding, or None.
        cache: where the last inputs are kept; goes on from there, and is updated.
        kernel: transformers' `causal_conv1d_fn`, for devices that have kernels.

    Returns:
        (batch, channels, L), zero at padding.

    Raises:
        ValueError: `cache` was made with another number of channels.
    """
    length = x.shape[-1]
    if mask is not None:
        x = x.masked_fill(~mask[:, None], 0)
    full = x
    if cache is not None:
        state = cache.get_conv_state(mixer.layer_idx)
        if state is not None and state.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"expected cache with a convolution state of {tuple(x.shape[:2])} in layer {mixer.layer_idx}, "
                f"found {tuple(state.shape[:2])}: start with a new cache after a change of batch or state size"
            )
        cached = cache.update_conv_state(x.detach(), mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
        full = torch.cat([cached[..., : cached.shape[-1] - length], x], dim=-1)
        if length == 1 and mask is None:  # a step of generation
            wide = torch.promote_types(x.dtype, torch.float32)
            weight = mixer.conv1d.weight[:, 0].to(wide)
            y = (full[..., -weight.shape[-1] :] * weight).sum(-1, keepdim=True)
            return mixer.act((y if mixer.conv1d.bias is None else y + mixer.conv1d.bias[:, None]).to(x.dtype))
    if mask is None:
        return _convolve(mixer, full, kernel)[..., full.shape[-1] - length :]

    real = F.pad(mask, (full.shape[-1] - length, 0), value=True)
    order = real.byte().argsort(dim=-1, stable=True)[:, None]
    full = full.gather(-1, order.expand_as(full))
    if cache is not None:
        state = cache.get_conv_state(mixer.layer_idx)
        state.copy_(full[..., full.shape[-1] - state.shape[-1] :].detach())
    back = order.argsort(dim=-1)[..., real.shape[-1] - length :]
    y = _convolve(mixer, full, kernel)
    return y.gather(-1, back.expand(-1, y.shape[1], -1)).masked_fill(~mask[:, None], 0)


def _convolve(mixer: nn.Module, x: torch.Tensor, kernel: Callable) -> torch.Tensor:
    # transformers takes kernels wherever they are installed, and on the CPU they fail.
    if x.device.type == "cpu":
        return convolve_and_act(mixer, x.mT).mT
    return kernel(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation=mixer.activation)


def convolve_and_act(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Convolution and activation of a mixer on the CPU, of `x (batch, L, channels)`, from nothing before it."""
    weight, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    if mixer.activation in ("silu", "swish"):
        return causal_conv(x, weight, bias, activation="silu")
    return mixer.act(causal_conv(x, weight, bias))
