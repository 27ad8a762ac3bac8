"""The steps of `lru_recurrence.py` as one kernel per direction, for GPUs; import this where Triton is installed.

A program carries `_CHANNELS` of the `batch * N` states through all steps in registers. A complex number is a pair of
neighbours in memory, and neighbouring threads hold neighbouring states, so that loads and stores are coalesced.
Programs add nothing up together, so results are the same bits in every run.
"""

import torch
import triton
import triton.language as tl

_CHANNELS = tl.constexpr(32)  # one warp: as many programs as can be
# Steps whose loads are under way at once and do not wait for the recurrence, by the asynchronous copies that GPUs have
# from compute capability 8.0 on; the compiler ignores it for older ones.
_STAGES = tl.constexpr(4)
_SIZES = ["steps", "batch", "n"]  # one compiled kernel for all of them


@triton.jit
def _place(batch, n):
    """Of the channels of this program: the row of the batch, whether they exist, offsets in a step and in lam."""
    channel = tl.program_id(0) * _CHANNELS + tl.arange(0, _CHANNELS)
    pair = tl.arange(0, 2)[None, :]
    return channel // n, channel < batch * n, 2 * channel[:, None] + pair, 2 * (channel % n)[:, None] + pair


@triton.jit(do_not_specialize=_SIZES)
def _advance(states, lam, live, steps, batch, n):
    row, inside, at, at_lam = _place(batch, n)
    exists = inside[:, None]
    lam_re, lam_im = tl.split(tl.load(lam + at_lam))
    re, im = tl.split(tl.load(states + at, exists))
    for _ in tl.range(steps, num_stages=_STAGES):
        states += 2 * batch * n
        new_re, new_im = tl.split(tl.load(states + at, exists))
        new_re += lam_re * re - lam_im * im
        new_im += lam_re * im + lam_im * re
        if live is not None:
            moves = tl.load(live + row, inside) != 0
            live += batch
            new_re, new_im = tl.where(moves, new_re, re), tl.where(moves, new_im, im)
        re, im = new_re, new_im
        tl.store(states + at, tl.join(re, im), exists)


@triton.jit(do_not_specialize=_SIZES)
def _retreat(adjoints, carry, states, lam, dlam, live, steps, batch, n):
    row, inside, at, at_lam = _place(batch, n)
    exists = inside[:, None]
    lam_re, lam_im = tl.split(tl.load(lam + at_lam))
    carry_re, carry_im = tl.split(tl.load(carry + at, exists))
    dlam_re, dlam_im = tl.zeros_like(lam_re), tl.zeros_like(lam_im)
    beyond = tl.cast(steps, tl.int64)  # all steps of all channels may be more than 32 bits can count
    adjoints += 2 * batch * n * beyond
    states += 2 * batch * n * beyond
    if live is not None:
        live += batch * beyond
    for _ in tl.range(steps, num_stages=_STAGES):
        adjoints -= 2 * batch * n
        states -= 2 * batch * n
        g_re, g_im = tl.split(tl.load(adjoints + at, exists))
        h_re, h_im = tl.split(tl.load(states + at, exists))
        g_re += carry_re
        g_im += carry_im
        carry_re = lam_re * g_re + lam_im * g_im
        carry_im = lam_re * g_im - lam_im * g_re
        if live is not None:  # a frozen step gives no gradient to its input or to lam
            live -= batch
            moves = tl.load(live + row, inside) != 0
            carry_re, carry_im = tl.where(moves, carry_re, g_re), tl.where(moves, carry_im, g_im)
            g_re, g_im = tl.where(moves, g_re, 0), tl.where(moves, g_im, 0)
        dlam_re += h_re * g_re + h_im * g_im
        dlam_im += h_re * g_im - h_im * g_re
        tl.store(adjoints + at, tl.join(g_re, g_im), exists)
    tl.store(carry + at, tl.join(carry_re, carry_im), exists)
    tl.store(dlam + at, tl.join(dlam_re, dlam_im), exists)


class FusedRecurrence:
    """What `lru_recurrence.Recurrence` is, with one kernel for each call."""

    def __init__(self, lam: torch.Tensor, states: torch.Tensor, adjoints: torch.Tensor | None = None):
        self.lam, self.states, self.adjoints = lam, states, adjoints

    def advance(self, steps: int, live: torch.Tensor | None) -> None:
        """As `Recurrence.advance`."""
        self._launch(_advance, (self.states, self.lam), live, steps)

    def retreat(self, steps: int, carry: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
        """As `Recurrence.retreat`."""
        dlam = torch.empty_like(carry)  # of each row of the batch
        self._launch(_retreat, (self.adjoints, carry, self.states, self.lam, dlam), live, steps)
        return dlam.sum(0)

    def _launch(self, kernel, tensors: tuple[torch.Tensor, ...], live: torch.Tensor | None, steps: int) -> None:
        batch, n = self.states.shape[1:]
        live = None if live is None else live.int()  # single bytes could not be loaded ahead of the recurrence
        grid = (triton.cdiv(batch * n, _CHANNELS.value),)
        with torch.cuda.device_of(self.states):  # else it would be launched on the current device
            kernel[grid](*(torch.view_as_real(x) for x in tensors), live, steps, batch, n, num_warps=1)


def check(device: torch.device) -> None:
    """Compile both kernels, with and without a mask, and run them on next to nothing; raises what prevents it."""
    lam, states, adjoints = (torch.zeros(*k, 1, dtype=torch.complex64, device=device) for k in ((), (2, 1), (1, 1)))
    smallest = FusedRecurrence(lam, states, adjoints)
    for live in (None, torch.ones(1, 1, dtype=torch.bool, device=device)):
        smallest.advance(1, live)
        smallest.retreat(1, torch.zeros_like(states[0]), live)
