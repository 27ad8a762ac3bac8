r"""The state space dual of Mamba-2: a selective recurrence with one decay per head, evaluated by matrix products.

$$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^\top, \qquad y_t = h_t C_t$$

for each head alone (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 6: the block decomposition of the
semiseparable matrix). `ssd_scan_reference` is the ground truth; `ssd_scan` is the fast form with the same meaning.

Shapes: `x (batch, L, H, P)`, `dt (batch, L, H)`, `A (H,)`, `B, C (batch, L, G, n)` where head `h` reads group
`h // (H / G)`, `y (batch, L, H, P)`, states `(batch, H, P, n)`.

Inside, a tile is one chunk of one sequence, R = H / G, and T is the length of a chunk. Per tile and group the states
are a matrix (n, R P), so that all heads of a group share the products with B and C.
"""

import math

import torch
import torch.nn.functional as F

from ._common import check_arguments, state_dtype, zero_where_masked

CHUNK_SIZE = 64
BLOCK_NUMBERS = 1 << 19  # numbers in the largest temporary of a CPU thread; several should stay in its caches


def ssd_scan_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `ssd_scan`, as a plain loop that autograd differentiates; `chunk_size` has no meaning here."""
    _check(x, dt, A, B, C, h0, mask, chunk_size)
    dtype = state_dtype(x)
    batch, length, heads, head_dim = x.shape
    B, C = (v.to(dtype).repeat_interleave(heads // v.shape[2], dim=2)[:, :, :, None] for v in (B, C))
    driven = (x.to(dtype) * dt[..., None].to(dtype))[..., None]
    h = driven.new_zeros(batch, heads, head_dim, B.shape[-1]) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t].to(dtype) * A.to(dtype))[..., None, None]
        moved = decay * h + driven[:, t] * B[:, t]
        h = moved if mask is None else torch.where(mask[:, t, None, None, None], moved, h)
        outputs.append((h * C[:, t]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else x
    return y.to(x.dtype), h


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t`, with states at the borders of chunks only.

    Inside a chunk the outputs are a masked product of matrices; the backward pass recomputes it. It gives first
    derivatives, for all inputs and `h0`, from those of `y` and `h_T`.

    Args:
        x: (batch, L, H, P), the input, of any floating dtype.
        dt: (batch, L, H), the step sizes, not negative (after the softplus and the clamping).
        A: (H,), the continuous-time eigenvalues, negative.
        B, C: (batch, L, G, n), the input and output vectors of each group; G divides H.
        h0: (batch, H, P, n), the state before the first step; None is zero.
        mask: (batch, L), bool. Where it is False the state stays as it is and `x`, `dt` and `B` are ignored, so that
            padding at any place changes neither later outputs nor the final state.
        chunk_size: time steps per product of matrices; it changes speed and memory only.

    Returns:
        y: (batch, L, H, P), in the dtype of `x`.
        h_T: (batch, H, P, n), the state after the last step, in float32 (float64 when `x` is float64).

    Raises:
        ValueError: shapes that do not fit each other, a number of groups that does not divide the heads, a mask that
            is not boolean, a chunk size below 1.
    """
    _check(x, dt, A, B, C, h0, mask, chunk_size)
    dtype = state_dtype(x)
    x, dt, B = zero_where_masked(mask, x, dt, B)
    if x.shape[1] == 1:  # a step of generation
        return ssd_scan_reference(x, dt, A, B, C, h0)
    groups = B.shape[2]
    # (batch, H, P, n) <-> (batch, G, n, R, P)
    h0 = None if h0 is None else h0.to(dtype).unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    y, h_last, _ = _scan(x, dt, A.to(dtype), B, C, h0, chunk_size)
    return y, h_last.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _check(x, dt, A, B, C, h0, mask, chunk_size) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            f"expected x (batch, L, H, P) and B (batch, L, G, n); found {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"expected a number of groups that divides the {heads} heads, found {groups}")
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, n)),
        "C": (C, (batch, length, groups, n)),
        "h0": (h0, (batch, heads, head_dim, n)),
        "mask": (mask, (batch, length)),
    }
    check_arguments(expected, mask, chunk_size)


def _blocks(x: torch.Tensor, n: int, chunk_size: int) -> tuple[list[slice], list[slice]]:
    """Slices of the batch and of the chunks whose tiles are worked on together."""
    batch, length, heads, head_dim = x.shape
    chunks = math.ceil(length / chunk_size)
    tiles = batch * chunks
    if x.device.type == "cpu":
        numbers = heads * max(chunk_size * max(chunk_size, head_dim), head_dim * n)  # of the largest part of a tile
        tiles = BLOCK_NUMBERS * torch.get_num_threads() // max(1, numbers)
    width = max(1, min(tiles, chunks))
    height = max(1, tiles // width)
    rows = [slice(i, min(i + height, batch)) for i in range(0, batch, height)]
    return rows, [slice(i, min(i + width, chunks)) for i in range(0, chunks, width)]


def _cumulative(dt: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms to base 2 of the decay from the start of each tile, as two summands; `dt (tiles, H, T)`.

    The first holds multiples of a power of two, coarse enough that its sums and differences over a chunk are exact.
    A sum in one number would lose the small steps after a large one.
    """
    info = torch.finfo(dt.dtype)
    vanishing = 2 - math.log2(info.tiny) - math.log2(info.eps)  # 2 to the minus this is zero
    grid = info.eps * 2.0 ** math.ceil(math.log2(vanishing * dt.shape[-1]))
    log_decay = (dt * (A * math.log2(math.e))[:, None]).clamp_(min=-vanishing)
    coarse = log_decay.div(grid).round_().mul_(grid)
    return coarse.cumsum(-1), log_decay.sub_(coarse).cumsum(-1)


class _Tiles:
    """The chunks of some sequences, with what the two passes both need."""

    def __init__(self, x, dt, A, B, C, rows: slice, chunks: slice, size: int):
        self.dtype, self.rows, self.size = A.dtype, rows, size
        self.start, self.stop = chunks.start * size, min(chunks.stop * size, x.shape[1])
        self.count = chunks.stop - chunks.start
        self.groups = B.shape[2]
        self.x, self.dt = self.cut(x), self.cut(dt)  # (tiles, T, H, P), (tiles, T, H)
        self.B, self.C = (self.cut(v).transpose(1, 2).flatten(0, 1) for v in (B, C))  # (tiles * G, T, n)
        tiles, _, heads, self.head_dim = self.x.shape
        self.driven = self.x.new_empty(tiles, heads, size, self.head_dim)  # dt x
        dt_heads = self.dt.transpose(1, 2).contiguous()
        torch.mul(self.x.transpose(1, 2), dt_heads[..., None], out=self.driven)
        coarse, fine = _cumulative(dt_heads, A)
        self.from_start = (coarse + fine).exp2_()  # decay from the start of the chunk through t: (tiles, H, T)
        self.to_end = ((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)).exp2_()
        future = torch.full((size, size), -math.inf, dtype=A.dtype, device=A.device).triu_(1)
        between = coarse[..., None] - coarse[..., None, :]
        between.add_(fine[..., None]).sub_(fine[..., None, :]).add_(future)
        self.between = between.exp2_()  # decay after step j through step i <= j, else 0: (tiles, H, T, T)
        self.scores = torch.bmm(self.C, self.B.transpose(1, 2))  # C_i . B_j: (tiles * G, T, T)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """The tiles of `x (batch, L, …)`: (tiles, T, …); zeros, which freeze the state, fill the last chunk."""
        part = x[self.rows, self.start : self.stop].to(self.dtype)
        missing = self.count * self.size - part.shape[1]
        if missing:
            part = F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing))
        return part.reshape(-1, self.size, *part.shape[2:])

    def paste(self, target: torch.Tensor, tiles: torch.Tensor) -> None:
        """The reverse of `cut`, into `target (batch, L, …)`."""
        part = tiles.reshape(-1, self.count * self.size, *tiles.shape[2:])
        target[self.rows, self.start : self.stop] = part[:, : self.stop - self.start]

    def by_group(self, x: torch.Tensor) -> torch.Tensor:
        """Split the heads of `x (tiles, H, …)`: (tiles, G, R, …)."""
        return x.unflatten(1, (self.groups, -1))

    def merged(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`x (tiles, H, T, P)` times `factor (tiles, H, T)`, the heads of a group side by side: (tiles G, T, R P)."""
        tiles, heads, size, head_dim = x.shape
        out = x.new_empty(tiles, self.groups, size, heads // self.groups, head_dim)
        torch.mul(self.by_group(x), self.by_group(factor)[..., None], out=out.transpose(2, 3))
        return out.view(tiles * self.groups, size, -1)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`x (tiles G, T, R P)` seen as (tiles, G, R, T, P)."""
        return x.view(-1, self.groups, self.size, x.shape[-1] // self.head_dim, self.head_dim).transpose(2, 3)

    def whole_decay(self) -> torch.Tensor:
        """The decay over each chunk, one number for each column of a state: (sequences, chunks, G, 1, R P)."""
        columns = self.by_group(self.from_start[..., -1:].expand(-1, -1, self.head_dim))
        return columns.reshape(-1, self.count, self.groups, 1, columns.shape[2] * columns.shape[3])


@torch.library.custom_op("hf_compressm::ssd_scan", mutates_args=())
def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    h0: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, the last state (batch, G, n, R, P), and the states before each chunk (batch, chunks, G, n, R P)."""
    y, h_last, borders = _scan_fake(x, dt, A, B, C, h0, chunk_size)
    size = min(chunk_size, max(1, x.shape[1]))
    h_last.zero_() if h0 is None else h_last.copy_(h0)
    state = h_last.flatten(3)
    with torch.autocast(x.device.type, enabled=False):
        row_slices, chunk_slices = _blocks(x, B.shape[-1], size)
        for rows in row_slices:
            for chunks in chunk_slices:
                tiles = _Tiles(x, dt, A, B, C, rows, chunks, size)
                _forward(tiles, y, state[rows], borders[rows, chunks])
    return y, h_last, borders


def _forward(tiles: _Tiles, y: torch.Tensor, state: torch.Tensor, before: torch.Tensor) -> None:
    """Advance `state (sequences, G, n, R P)` over the tiles; writes `y`, and the states `before` each chunk."""
    updates = torch.bmm(tiles.B.transpose(1, 2), tiles.merged(tiles.driven, tiles.to_end)).view(before.shape)
    decay = tiles.whole_decay()
    for k in range(tiles.count):
        before[:, k] = state
        torch.addcmul(updates[:, k], before[:, k], decay[:, k], out=state)
    weights = tiles.by_group(tiles.between).mul_(tiles.scores.unflatten(0, (-1, tiles.groups))[:, :, None])
    inside = torch.bmm(weights.flatten(0, 2), tiles.driven.flatten(0, 1))
    carried = tiles.split(torch.bmm(tiles.C, before.flatten(0, 2)))
    out = torch.empty_like(tiles.x)
    torch.addcmul(
        tiles.by_group(inside.view(tiles.driven.shape)),
        carried,
        tiles.by_group(tiles.from_start)[..., None],
        out=out.unflatten(2, (tiles.groups, -1)).permute(0, 2, 3, 1, 4),
    )
    tiles.paste(y, out)


@_scan.register_fake
def _scan_fake(x, dt, A, B, C, h0, chunk_size):
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    chunks = (length + chunk_size - 1) // chunk_size
    return (
        x.new_empty(x.shape),
        A.new_empty(batch, groups, n, heads // groups, head_dim),
        A.new_empty(batch, chunks, groups, n, heads // groups * head_dim),
    )


@torch.library.custom_op("hf_compressm::ssd_scan_backward", mutates_args=())
def _scan_backward(
    dy: torch.Tensor,
    dh_last: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    borders: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, A, B, C and h0."""
    gradients = _scan_backward_fake(dy, dh_last, x, dt, A, B, C, borders, chunk_size)
    dx, ddt, dA, dB, dC, dh0 = gradients
    dA.zero_()
    dh0.copy_(dh_last)
    size = min(chunk_size, max(1, x.shape[1]))
    with torch.autocast(x.device.type, enabled=False):
        row_slices, chunk_slices = _blocks(x, B.shape[-1], size)
        for rows in row_slices:
            for chunks in reversed(chunk_slices):
                tiles = _Tiles(x, dt, A, B, C, rows, chunks, size)
                adjoint = dh0[rows].flatten(3)
                ddriven, dlog, *parts = _adjoint(tiles, tiles.cut(dy), adjoint, borders[rows, chunks])
                dA += (dlog * tiles.dt).sum((0, 1))
                ddt_tiles = (ddriven * tiles.x).sum(-1).addcmul_(dlog, A)
                parts = [ddriven.mul_(tiles.dt[..., None]), ddt_tiles, *parts]
                for target, part in zip((dx, ddt, dB, dC), parts, strict=True):
                    tiles.paste(target, part)
    return gradients


def _adjoint(
    tiles: _Tiles, dy: torch.Tensor, adjoint: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take `adjoint`, of the state after the tiles, back to that before them.

    Returns the gradients of dt x (tiles, T, H, P), of dt A (tiles, T, H), and of B and C (tiles, T, G, n).
    """
    dy_heads = dy.transpose(1, 2).contiguous()
    dy_decayed = tiles.merged(dy_heads, tiles.from_start)
    inputs = tiles.merged(tiles.driven, tiles.to_end)
    states = before.flatten(0, 2)

    # Between the chunks: y_i reads the state before the chunk, which the steps before the chunk added up.
    decay = tiles.whole_decay()
    dbefore = torch.bmm(tiles.C.transpose(1, 2), dy_decayed).view(before.shape)
    dupdates = torch.empty_like(before)
    for k in reversed(range(tiles.count)):
        dupdates[:, k] = adjoint
        torch.addcmul(dbefore[:, k], dupdates[:, k], decay[:, k], out=adjoint)
    dinputs = torch.bmm(tiles.B, dupdates.flatten(0, 2))
    dC = torch.bmm(dy_decayed, states.transpose(1, 2))
    dB = torch.bmm(inputs, dupdates.flatten(0, 2).transpose(1, 2))
    across_start = tiles.split(torch.bmm(tiles.C, states).mul_(dy_decayed)).sum(-1).flatten(1, 2)
    across_end = tiles.split(inputs.mul_(dinputs)).sum(-1).flatten(1, 2)
    across_all = (dupdates.mul_(before).sum(3, keepdim=True) * decay).view(*across_end.shape[:2], -1)

    # Inside a chunk: y_i = sum over j <= i of weights_ij (dt x)_j.
    scores = tiles.scores.unflatten(0, (-1, tiles.groups))[:, :, None]
    weights = tiles.by_group(tiles.between) * scores
    flat = weights.flatten(0, 2)
    ddriven = torch.bmm(flat.transpose(1, 2), dy_heads.flatten(0, 1)).view(dy_heads.shape)
    tiles.by_group(ddriven).addcmul_(tiles.split(dinputs), tiles.by_group(tiles.to_end)[..., None])
    torch.bmm(dy_heads.flatten(0, 1), tiles.driven.flatten(0, 1).transpose(1, 2), out=flat)
    dscores = weights.mul_(tiles.by_group(tiles.between)).sum(2).flatten(0, 1)
    dC.baddbmm_(dscores, tiles.B)
    dB.baddbmm_(dscores.transpose(1, 2), tiles.C)

    # The logarithm of the decay at step t is in every span from j < t to i >= t. All spans are added up and none
    # subtracted: differences of sums would leave rounding errors where everything has decayed.
    earlier = torch.ones_like(tiles.between[0, 0]).triu_(1)
    reached = torch.ones_like(earlier).tril_()
    spans = (weights.mul_(scores).flatten(0, 3) @ earlier).view(tiles.between.shape).mul_(reached).sum(2)
    dlog = spans + across_start @ reached + across_end @ earlier + across_all.sum(-1, keepdim=True)
    dB, dC = (v.unflatten(0, (-1, tiles.groups)).transpose(1, 2) for v in (dB, dC))
    return ddriven.transpose(1, 2), dlog.transpose(1, 2), dB, dC


@_scan_backward.register_fake
def _scan_backward_fake(dy, dh_last, x, dt, A, B, C, borders, chunk_size):
    return tuple(v.new_empty(v.shape) for v in (x, dt, A, B, C, dh_last))


def _save_for_backward(ctx, inputs, output) -> None:
    x, dt, A, B, C, h0, ctx.chunk_size = inputs
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(x, dt, A, B, C, output[2])


def _backward(ctx, dy, dh_last, _):
    x, dt, A, B, C, borders = ctx.saved_tensors
    *gradients, dh0 = _scan_backward(dy, dh_last, x, dt, A, B, C, borders, ctx.chunk_size)
    return *gradients, dh0 if ctx.has_h0 else None, None


_scan.register_autograd(_backward, setup_context=_save_for_backward)
