r"""The selective scan of Mamba: a diagonal recurrence whose step size, input and output depend on the input.

$$h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t u_t B_t, \qquad y_t = C_t \cdot h_t$$

for each channel alone (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv
2312.00752, equation 2 with A discretised by equation 4 and, as in all implementations, B by its first order; without
the skip connection). `selective_scan_reference` is the ground truth; `selective_scan` the fast form of the same.

Shapes: `u, delta (batch, L, D)`, `A (D, n)`, `B, C (batch, L, n)`, `y (batch, L, D)`, states `(batch, D, n)`.
"""

import math
from collections.abc import Iterator

import torch

from ._common import check_arguments, state_dtype, zero_where_masked

CHUNK_SIZE = 16
BLOCK_STATES = 1 << 15  # states that a CPU thread advances at once; a chunk of them should stay in its caches


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `selective_scan`, as a plain loop that autograd differentiates; `chunk_size` has no meaning here."""
    check_scan(u, delta, A, B, C, h0, mask, chunk_size)
    dtype = state_dtype(u)
    h = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None].to(dtype)
        moved = torch.exp(step * A.to(dtype)) * h + step * u[:, t, :, None].to(dtype) * B[:, t, None].to(dtype)
        h = moved if mask is None else torch.where(mask[:, t, None, None], moved, h)
        outputs.append((h * C[:, t, None].to(dtype)).sum(-1))
    y = torch.stack(outputs, 1) if outputs else u
    return y.to(u.dtype), h


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t`, `y_t = C_t . h_t`, with the states of one chunk in memory.

    The backward pass recomputes the states chunk by chunk from the state at the start of each chunk. It gives first
    derivatives, for all inputs and `h0`, from those of `y` and `h_T`.

    Args:
        u: (batch, L, D), the input, of any floating dtype.
        delta: (batch, L, D), the step sizes, not negative (after the softplus).
        A: (D, n), the continuous-time eigenvalues, negative.
        B, C: (batch, L, n), the input and output vectors.
        h0: (batch, D, n), the state before the first step; None is zero.
        mask: (batch, L), bool. Where it is False the state stays as it is and `u`, `delta` and `B` are ignored, so
            that padding at any place changes neither later outputs nor the final state.
        chunk_size: time steps whose states are held at once.

    Returns:
        y: (batch, L, D), in the dtype of `u`.
        h_T: (batch, D, n), the state after the last step, in float32 (float64 when `u` is float64).

    Raises:
        ValueError: shapes that do not fit each other, a mask that is not boolean, a chunk size below 1.
    """
    check_scan(u, delta, A, B, C, h0, mask, chunk_size)
    dtype = state_dtype(u)
    u, delta, B = zero_where_masked(mask, u, delta, B)
    if u.shape[1] == 1:  # a step of generation
        return selective_scan_reference(u, delta, A, B, C, h0)
    # Channels last: the innermost loops run over the longest dimension and the sums over n are matrix products.
    h0 = None if h0 is None else h0.to(dtype).transpose(1, 2)
    y, h_last, _ = _scan(u, delta, A.to(dtype).t(), B, C, h0, chunk_size)
    return y, h_last.transpose(1, 2)


def check_scan(u, delta, A, B, C, h0, mask=None, chunk_size=CHUNK_SIZE) -> None:
    """Raise ValueError for what does not fit."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"expected u (batch, L, D) and A (D, n); found {tuple(u.shape)} and {tuple(A.shape)}")
    batch, length, channels = u.shape
    n = A.shape[1]
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, n)),
        "B": (B, (batch, length, n)),
        "C": (C, (batch, length, n)),
        "h0": (h0, (batch, channels, n)),
        "mask": (mask, (batch, length)),
    }
    check_arguments(expected, mask, chunk_size)


def _blocks(batch: int, n: int, channels: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the channels that together hold about `BLOCK_STATES` states per thread."""
    limit = BLOCK_STATES * torch.get_num_threads() // n if device.type == "cpu" else batch * channels
    parts = math.ceil(channels / max(1, limit))
    width = math.ceil(channels / max(1, parts))
    height = max(1, limit // max(1, channels))
    for row in range(0, batch, height):
        for column in range(0, channels, width):
            yield slice(row, min(row + height, batch)), slice(column, min(column + width, channels))


class _Block:
    """The states of a slice of the sequences and of the channels, over the steps of one chunk."""

    def __init__(self, u, delta, A, B, C, rows: slice, columns: slice, chunk_size: int):
        self.sources = (u[rows, :, columns], delta[rows, :, columns], B[rows], C[rows])
        self.A = A[:, columns].contiguous()
        self.dtype = A.dtype
        self.rates = self.A * math.log2(math.e)  # exp2 costs a third of exp
        steps = min(chunk_size, u.shape[1])
        shape = (u[rows].shape[0], *self.A.shape)
        self.decays = A.new_empty(steps, *shape)
        self.states = A.new_empty(steps + 1, *shape)  # with the state before the first step
        self.decay, self.state = self.decays.unbind(0), self.states.unbind(0)

    def steps(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Time steps `start:stop` of `x (sequences, L, …)`, contiguous and time first."""
        return x[:, start:stop].transpose(0, 1).to(self.dtype).contiguous()

    def run(self, start: int, stop: int) -> None:
        """Advance from `state[0]` over `start:stop`; leaves the inputs of these steps in `u`, `delta`, `B` and `C`."""
        count = stop - start
        self.u, self.delta, self.B, self.C = (self.steps(x, start, stop) for x in self.sources)
        self.driven = self.delta * self.u
        torch.mul(self.delta[:, :, None], self.rates, out=self.decays[:count]).exp2_()
        torch.mul(self.driven[:, :, None], self.B[..., None], out=self.states[1 : count + 1])
        for k in range(count):
            self.state[k + 1].addcmul_(self.decay[k], self.state[k])


def _over_n(vectors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sum over n of `vectors (steps, b, n)` times `states (steps, b, n, d)`: (steps, b, d)."""
    return torch.bmm(vectors.flatten(0, 1)[:, None], states.flatten(0, 1)).view(*states.shape[:2], -1)


def _over_channels(vectors: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Sum over d of `vectors (steps, b, d)` times `states (steps, b, n, d)`, batch first: (b, steps, n)."""
    sums = torch.bmm(vectors.flatten(0, 1)[:, None], states.flatten(0, 1).transpose(1, 2))
    return sums.view(*states.shape[:3]).transpose(0, 1)


@torch.library.custom_op("hf_compressm::selective_scan", mutates_args=())
def _scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, the last state (batch, n, D), and the states at the start of each chunk for the backward."""
    y, h_last, borders = _scan_fake(u, delta, A, B, C, h0, chunk_size)
    batch, length, channels = u.shape
    with torch.autocast(u.device.type, enabled=False):
        for rows, columns in _blocks(batch, A.shape[0], channels, u.device):
            block = _Block(u, delta, A, B, C, rows, columns, chunk_size)
            state = block.state[0]
            state.zero_() if h0 is None else state.copy_(h0[rows, :, columns])
            for c, start in enumerate(range(0, length, chunk_size)):
                stop = min(start + chunk_size, length)
                borders[c, rows, :, columns] = state
                block.run(start, stop)
                y[rows, start:stop, columns] = _over_n(block.C, block.states[1 : stop - start + 1]).transpose(0, 1)
                state.copy_(block.state[stop - start])
            h_last[rows, :, columns] = state
    return y, h_last, borders


@_scan.register_fake
def _scan_fake(u, delta, A, B, C, h0, chunk_size):
    batch, length, channels = u.shape
    chunks = (length + chunk_size - 1) // chunk_size
    state = (batch, A.shape[0], channels)
    return u.new_empty(u.shape), A.new_empty(state), A.new_empty(chunks, *state)


@torch.library.custom_op("hf_compressm::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: torch.Tensor,
    dh_last: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    borders: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, delta, A, B, C and h0, by the adjoint recurrence g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}."""
    gradients = _scan_backward_fake(dy, dh_last, u, delta, A, B, C, borders, chunk_size)
    du, ddelta, dA, dB, dC, dh0 = gradients
    batch, length, channels = u.shape
    dA.zero_()
    # Sums over the blocks of channels, so in the dtype of the state until they are complete.
    dB_sum, dC_sum = A.new_zeros(B.shape), A.new_zeros(C.shape)
    with torch.autocast(u.device.type, enabled=False):
        for rows, columns in _blocks(batch, A.shape[0], channels, u.device):
            block = _Block(u, delta, A, B, C, rows, columns, chunk_size)
            dy_block = dy[rows, :, columns]
            adjoints = torch.empty_like(block.decays)
            g = adjoints.unbind(0)
            dA_block = torch.zeros_like(block.state[0])
            carry = dh_last[rows, :, columns].clone(memory_format=torch.contiguous_format)
            for c in reversed(range(borders.shape[0])):
                start, stop = c * chunk_size, min((c + 1) * chunk_size, length)
                count = stop - start
                block.state[0].copy_(borders[c, rows, :, columns])
                block.run(start, stop)
                states, decays = block.states[: count + 1], block.decays[:count]
                dy_steps = block.steps(dy_block, start, stop)
                chunk = torch.mul(dy_steps[:, :, None], block.C[..., None], out=adjoints[:count])
                g[count - 1].add_(carry)
                for k in reversed(range(count - 1)):
                    g[k].addcmul_(block.decay[k + 1], g[k + 1])
                torch.mul(block.decay[0], g[0], out=carry)
                dC_sum[rows, start:stop] += _over_channels(dy_steps, states[1:])
                dB_sum[rows, start:stop] += _over_channels(block.driven, chunk)
                ddriven = _over_n(block.B, chunk)
                here = (rows, slice(start, stop), columns)
                torch.mul(ddriven, block.delta, out=du[here].transpose(0, 1))
                dlog = chunk.mul_(states[:-1]).mul_(decays)  # of delta_t A, channel by channel
                dA_block += torch.mul(dlog, block.delta[:, :, None], out=decays).sum(0)
                torch.addcmul(dlog.mul_(block.A).sum(2), ddriven, block.u, out=ddelta[here].transpose(0, 1))
            dh0[rows, :, columns] = carry
            dA[:, columns] += dA_block.sum(0)
    dB.copy_(dB_sum)
    dC.copy_(dC_sum)
    return gradients


@_scan_backward.register_fake
def _scan_backward_fake(dy, dh_last, u, delta, A, B, C, borders, chunk_size):
    return tuple(x.new_empty(x.shape) for x in (u, delta, A, B, C, dh_last))


def _save_for_backward(ctx, inputs, output) -> None:
    u, delta, A, B, C, h0, ctx.chunk_size = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(u, delta, A, B, C, output[2])


def _backward(ctx, dy, dh_last, _):
    u, delta, A, B, C, borders = ctx.saved_tensors
    *gradients, dh0 = _scan_backward(dy, dh_last, u, delta, A, B, C, borders, ctx.chunk_size)
    return *gradients, dh0 if ctx.has_h0 else None, None


_scan.register_autograd(_backward, setup_context=_save_for_backward)
