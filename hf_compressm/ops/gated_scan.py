r"""The selective scan of Mamba with what surrounds it in a block: the softplus of the step, the skip and the gate.

$$\Delta_t = \mathrm{softplus}(\delta_t + \beta), \qquad
o_t = \big(\mathrm{scan}(u, \Delta, A, B, C)_t + D \odot u_t\big) \odot \mathrm{SiLU}(z_t)$$

(Gu and Dao, arXiv 2312.00752, section 3.4). On the CPU all of it is one compiled loop where numba is installed
(`fused.py`); elsewhere it is made of the operations of PyTorch and of `selective_scan`.

Shapes: `u, delta, z (batch, L, D)`, `A (D, n)`, `B, C (batch, L, n)`, `D, delta_bias (D,)`, states `(batch, D, n)`.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from . import fused
from ._common import state_dtype
from .selective_scan import check_scan, selective_scan, selective_scan_reference


def gated_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    h0: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `gated_scan`, around the plain loop that autograd differentiates."""
    _check(u, delta, A, B, C, D, z, delta_bias, h0)
    return _around(selective_scan_reference, u, delta, A, B, C, D, z, delta_bias, h0)


def gated_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    h0: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(scan + D u) SiLU(z)` with the step sizes `softplus(delta + delta_bias)`; states of one chunk in memory.

    Args:
        u: (batch, L, D), the input, of any floating dtype.
        delta: (batch, L, D), the step sizes before bias and softplus.
        A: (D, n), the continuous-time eigenvalues, not positive.
        B, C: (batch, L, n), the input and output vectors.
        D, delta_bias: (D,).
        z: (batch, L, D), the gate before its SiLU.
        h0: (batch, D, n), the state before the first step; None is zero.

    Returns:
        o: (batch, L, D), in the dtype of `u`.
        h_T: (batch, D, n), the state after the last step, in float32 (float64 when `u` is float64).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, h0)
    dtype = state_dtype(u)
    if u.shape[1] == 1 and h0 is not None:
        return _step(u, delta, A, B, C, D, z, delta_bias, h0)
    if u.shape[1] <= 1 or not fused.usable(u.device):
        return _around(selective_scan, u, delta, A, B, C, D, z, delta_bias, h0)
    h0 = None if h0 is None else h0.to(dtype).transpose(1, 2)
    out, h_last, _, _ = _scan(u, delta, A.to(dtype).t(), B, C, D.to(dtype), z, delta_bias.to(dtype), h0)
    return out, h_last.transpose(1, 2)


def _check(u, delta, A, B, C, D, z, delta_bias, h0) -> None:
    check_scan(u, delta, A, B, C, h0)
    for name, x, shape in (("D", D, A.shape[:1]), ("z", z, u.shape), ("delta_bias", delta_bias, A.shape[:1])):
        if x.shape != shape:
            raise ValueError(f"expected {name} of shape {tuple(shape)}, found {tuple(x.shape)}")


def _around(scan: Callable, u, delta, A, B, C, D, z, delta_bias, h0) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = state_dtype(u)
    y, h_last = scan(u, F.softplus(delta.to(dtype) + delta_bias), A, B, C, h0=h0)
    return ((y + u * D) * F.silu(z)).to(u.dtype), h_last


def _step(u, delta, A, B, C, D, z, delta_bias, h0) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of generation, in as few operations as there are."""
    dtype = state_dtype(u)
    x, delta, B, C = (x[:, 0].to(dtype) for x in (u, delta, B, C))
    A, D, delta_bias, h0 = (x.to(dtype) for x in (A, D, delta_bias, h0))
    step = F.softplus(delta + delta_bias)
    h = torch.exp(step[..., None] * A) * h0 + (step * x)[..., None] * B[:, None]
    y = torch.addcmul((h * C[:, None]).sum(-1), x, D)  # not a matrix product, which autocast would round
    return (y * F.silu(z[:, 0])).to(u.dtype)[:, None], h


@torch.library.custom_op("hf_compressm::gated_scan", mutates_args=())
def _scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    h0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the output, the last state (batch, n, D), and for the backward the output before the gate and the
    states at the start of each chunk."""
    out, h_last, y, borders = _scan_fake(u, delta, A, B, C, D, z, delta_bias, h0)
    h_last.zero_() if h0 is None else h_last.copy_(h0)
    wide = out if out.dtype == A.dtype else torch.empty_like(out, dtype=A.dtype)
    fused.scan_forward(u, delta, A, B, C, D, z, delta_bias, h_last, wide, y, borders)
    return wide.to(out.dtype), h_last, y, borders


@_scan.register_fake
def _scan_fake(u, delta, A, B, C, D, z, delta_bias, h0):
    state = (u.shape[0], *A.shape)
    chunks = -(-u.shape[1] // fused.CHUNK)
    return u.new_empty(u.shape), A.new_empty(state), A.new_empty(u.shape), A.new_empty(chunks, *state)


@torch.library.custom_op("hf_compressm::gated_scan_backward", mutates_args=())
def _scan_backward(
    dout: torch.Tensor,
    dh_last: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    y: torch.Tensor,
    borders: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of all inputs, that of h0 last."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    gradients = fused.scan_backward(dout, dh_last, *inputs, y, borders)
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, (*inputs, dh_last), strict=True)]


@_scan_backward.register_fake
def _scan_backward_fake(dout, dh_last, u, delta, A, B, C, D, z, delta_bias, y, borders):
    return [x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, delta_bias, dh_last)]


def _save_for_backward(ctx, inputs, output) -> None:
    *inputs, h0 = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(*inputs, *output[2:])


def _backward(ctx, dout, dh_last, *_):
    *gradients, dh0 = _scan_backward(dout, dh_last, *ctx.saved_tensors)
    return *gradients, dh0 if ctx.has_h0 else None


_scan.register_autograd(_backward, setup_context=_save_for_backward)
