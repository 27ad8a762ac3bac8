r"""The linear recurrence of a MIMO state space model with a complex diagonal state matrix.

$$h_t = \mathrm{diag}(\lambda)\, h_{t-1} + B u_t, \qquad y_t = \mathrm{Re}(C h_t)$$

(Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349, equation 1, without
the feedthrough). `lru_scan_reference` is the ground truth; `lru_scan` is the fast form with the same meaning.

Shapes: `u (batch, L, H)`, `lam (N,)`, `B (N, H)`, `C (P, N)`, `y (batch, L, P)`, states `(batch, N, 2)` with the real
and the imaginary part in the last dimension.
"""

import torch

from ._common import check_arguments, state_dtype
from .lru_convolution import convolution_is_faster, convolve
from .lru_recurrence import recurrence_on

CHUNK_SIZE = 32  # whose states fit a CPU's cache
GPU_CHUNK_SIZE = 512  # which keeps large products and kernels busy


def lru_scan_reference(
    u: torch.Tensor,
    lam_re: torch.Tensor,
    lam_im: torch.Tensor,
    B_re: torch.Tensor,
    B_im: torch.Tensor,
    C_re: torch.Tensor,
    C_im: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same as `lru_scan`, as a plain loop that autograd differentiates; `chunk_size` has no meaning here."""
    _check_shapes(u, lam_re, lam_im, B_re, B_im, C_re, C_im, h0, mask, chunk_size)
    dtype = state_dtype(u)
    lam, B, C = (
        torch.complex(re.to(dtype), im.to(dtype)) for re, im in ((lam_re, lam_im), (B_re, B_im), (C_re, C_im))
    )
    driven = u if mask is None else u.masked_fill(~mask[..., None], 0)
    driven = driven.to(B.dtype) @ B.T
    h = driven.new_zeros(u.shape[0], lam.shape[0]) if h0 is None else torch.view_as_complex(h0.to(dtype).contiguous())
    outputs = []
    for t, new in enumerate(driven.unbind(1)):
        moved = lam * h + new
        h = moved if mask is None else torch.where(mask[:, t, None], moved, h)
        outputs.append((h @ C.T).real)
    y = torch.stack(outputs, 1) if outputs else u.new_zeros(u.shape[0], 0, C.shape[0])
    return y.to(u.dtype), torch.view_as_real(h) if final_state else None


def lru_scan(
    u: torch.Tensor,
    lam_re: torch.Tensor,
    lam_im: torch.Tensor,
    B_re: torch.Tensor,
    B_im: torch.Tensor,
    C_re: torch.Tensor,
    C_im: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
    final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`h_t = lam h_{t-1} + B u_t`, `y_t = Re(C h_t)`, with memory for the states of one chunk only.

    The backward pass recomputes the states chunk by chunk from the state at the start of each chunk. It gives first
    derivatives, for the input, the parameters and `h0`, from those of `y` and `h_T`.

    Without `h0` and `final_state` it is a convolution where that should be faster, as it is for a few inputs
    and outputs (`lru_convolution.py`).

    Args:
        u: (batch, L, H), the input, of any floating dtype.
        lam_re, lam_im: (N,), the eigenvalues.
        B_re, B_im: (N, H), the input matrix, normalisation included.
        C_re, C_im: (P, N), the output matrix.
        h0: (batch, N, 2), the state before the first step; None is zero.
        mask: (batch, L), bool. Where it is False the state stays as it is and the input is ignored, so that padding
            at any place changes neither later outputs nor the final state.
        chunk_size: time steps whose states are held at once; None is 512 on CUDA and 32 elsewhere.
        final_state: whether the state after the last step is wanted.

    Returns:
        y: (batch, L, P), in the dtype of `u`.
        h_T: (batch, N, 2), the state after the last step, in float32 (float64 when `u` is float64); or None.

    Raises:
        ValueError: shapes that do not fit each other, a mask that is not boolean, a chunk size below 1.
    """
    if chunk_size is None:
        chunk_size = GPU_CHUNK_SIZE if u.is_cuda else CHUNK_SIZE
    _check_shapes(u, lam_re, lam_im, B_re, B_im, C_re, C_im, h0, mask, chunk_size)
    dtype = state_dtype(u)
    lam = torch.stack([lam_re.to(dtype), lam_im.to(dtype)], -1)
    # Real views of complex buffers hold the real and imaginary parts side by side, so the weights are interleaved.
    w_in = torch.stack([B_re.to(dtype), B_im.to(dtype)], 1).flatten(0, 1)
    w_out = torch.stack([C_re.to(dtype), -C_im.to(dtype)], 2).flatten(1, 2)
    sizes = (*u.shape[:2], lam.shape[0], u.shape[2], w_out.shape[0])
    if h0 is None and not final_state and convolution_is_faster(*sizes):
        return convolve(u, lam, w_in, w_out, mask), None
    h0 = None if h0 is None else h0.to(dtype)
    y, h_last, _ = _scan(u, lam, w_in, w_out, h0, mask, chunk_size)
    return y, h_last if final_state else None


def _check_shapes(u, lam_re, lam_im, B_re, B_im, C_re, C_im, h0, mask, chunk_size) -> None:
    if u.dim() != 3 or lam_re.dim() != 1 or C_re.dim() != 2:
        raise ValueError(
            "expected u (batch, L, H), lam (N,) and C (P, N); "
            f"found {tuple(u.shape)}, {tuple(lam_re.shape)} and {tuple(C_re.shape)}"
        )
    batch, length, width = u.shape
    n, p = lam_re.shape[0], C_re.shape[0]
    expected = {
        "lam_im": (lam_im, (n,)),
        "B_re": (B_re, (n, width)),
        "B_im": (B_im, (n, width)),
        "C_re": (C_re, (p, n)),
        "C_im": (C_im, (p, n)),
        "h0": (h0, (batch, n, 2)),
        "mask": (mask, (batch, length)),
    }
    check_arguments(expected, mask, chunk_size)


def _rows(x: torch.Tensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Time steps `start:stop` of `x (batch, L, d)` as a contiguous matrix `(steps * batch, d)`, time first."""
    return x[:, start:stop].transpose(0, 1).to(dtype=dtype, memory_format=torch.contiguous_format).flatten(0, 1)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """A real view (steps * batch, 2 N) of `x (steps, batch, N)`, complex."""
    return torch.view_as_real(x).flatten(2).flatten(0, 1)


class _Chunk:
    """States of up to `size` time steps with the state before them, and the recurrence on them."""

    def __init__(
        self,
        u: torch.Tensor,
        lam: torch.Tensor,
        w_in: torch.Tensor,
        mask: torch.Tensor | None,
        size: int,
        backward: bool = False,
    ):
        batch, length, _ = u.shape
        self.u, self.w_in, self.dtype = u, w_in, lam.dtype
        self.mask = None if mask is None else mask.t().contiguous()
        lam = torch.view_as_complex(lam.contiguous())
        self.states = torch.empty(min(size, length) + 1, batch, lam.shape[0], dtype=lam.dtype, device=u.device)
        self.adjoints = torch.empty_like(self.states[1:]) if backward else None
        self.recurrence = recurrence_on(u.device)(lam, self.states, self.adjoints)

    def live(self, start: int, stop: int) -> torch.Tensor | None:
        """The mask of `start:stop` (steps, batch), or None where it is known to hide nothing."""
        if self.mask is None:
            return None
        live = self.mask[start:stop]
        # To look at it, the host would have to wait for a GPU.
        return None if not live.is_cuda and live.all() else live

    def run(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Advance from `states[0]` over `start:stop`.

        Returns the inputs (steps * batch, H), masked ones zero whatever they hold, and the states (steps * batch, 2N)
        as rows, and the mask (steps, batch) or None.
        """
        live = self.live(start, stop)
        inputs = _rows(self.u, start, stop, self.dtype)
        if live is not None:
            inputs = inputs.masked_fill(live.logical_not().view(-1, 1), 0)
        states = _as_rows(self.states[1 : stop - start + 1])
        torch.mm(inputs, self.w_in.t(), out=states)
        self.recurrence.advance(stop - start, live)
        return inputs, states, live


@torch.library.custom_op("hf_compressm::lru_scan", mutates_args=())
def _scan(
    u: torch.Tensor,
    lam: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    h0: torch.Tensor | None,
    mask: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, the last state, and the states at the start of each chunk (chunks, batch, N, 2) for the backward."""
    y, h_last, borders = _scan_fake(u, lam, w_in, w_out, h0, mask, chunk_size)
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        chunk = _Chunk(u, lam, w_in, mask, chunk_size)
        state = torch.view_as_real(chunk.states)
        state[0].zero_() if h0 is None else state[0].copy_(h0)
        for c, start in enumerate(range(0, length, chunk_size)):
            stop = min(start + chunk_size, length)
            borders[c].copy_(state[0])
            _, rows, _ = chunk.run(start, stop)
            y[:, start:stop] = (rows @ w_out.t()).unflatten(0, (stop - start, -1)).transpose(0, 1)
            state[0].copy_(state[stop - start])
        h_last.copy_(state[0])
    return y, h_last, borders


@_scan.register_fake
def _scan_fake(u, lam, w_in, w_out, h0, mask, chunk_size):
    batch, length, _ = u.shape
    chunks = (length + chunk_size - 1) // chunk_size
    return (
        u.new_empty(batch, length, w_out.shape[0]),
        lam.new_empty(batch, lam.shape[0], 2),
        lam.new_empty(chunks, batch, lam.shape[0], 2),
    )


@torch.library.custom_op("hf_compressm::lru_scan_backward", mutates_args=())
def _scan_backward(
    dy: torch.Tensor,
    dh_last: torch.Tensor,
    u: torch.Tensor,
    lam: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    borders: torch.Tensor,
    mask: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, lam, w_in, w_out and h0, by the adjoint recurrence g_t = C^H dy_t + conj(lam) g_{t+1}."""
    du, dlam, dw_in, dw_out, dh0 = _scan_backward_fake(dy, dh_last, u, lam, w_in, w_out, borders, mask, chunk_size)
    for total in (dlam, dw_in, dw_out):
        total.zero_()
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        chunk = _Chunk(u, lam, w_in, mask, chunk_size, backward=True)
        state = torch.view_as_real(chunk.states)
        dlam_complex = torch.view_as_complex(dlam)
        carry = torch.view_as_complex(dh_last.contiguous()).clone()
        for c in reversed(range(borders.shape[0])):
            start = c * chunk_size
            stop = min(start + chunk_size, length)
            count = stop - start
            state[0].copy_(borders[c])
            inputs, rows, live = chunk.run(start, stop)
            dy_rows = _rows(dy, start, stop, lam.dtype)
            dw_out.addmm_(dy_rows.t(), rows)
            g_rows = _as_rows(chunk.adjoints[:count])
            torch.mm(dy_rows, w_out, out=g_rows)
            dlam_complex.add_(chunk.recurrence.retreat(count, carry, live))
            dw_in.addmm_(g_rows.t(), inputs)
            du[:, start:stop] = (g_rows @ w_in).unflatten(0, (count, -1)).transpose(0, 1)
        dh0.copy_(torch.view_as_real(carry))
    return du, dlam, dw_in, dw_out, dh0


@_scan_backward.register_fake
def _scan_backward_fake(dy, dh_last, u, lam, w_in, w_out, borders, mask, chunk_size):
    return (
        u.new_empty(u.shape),
        lam.new_empty(lam.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
        dh_last.new_empty(dh_last.shape),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    u, lam, w_in, w_out, h0, mask, ctx.chunk_size = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(u, lam, w_in, w_out, output[2], mask)


def _backward(ctx, dy, dh_last, _):
    u, lam, w_in, w_out, borders, mask = ctx.saved_tensors
    du, dlam, dw_in, dw_out, dh0 = _scan_backward(dy, dh_last, u, lam, w_in, w_out, borders, mask, ctx.chunk_size)
    return du, dlam, dw_in, dw_out, dh0 if ctx.has_h0 else None, None, None


_scan.register_autograd(_backward, setup_context=_save_for_backward)
