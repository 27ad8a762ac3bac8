"""The loops of `fused.py`, compiled by numba when they are first called; import this where numba is installed.

All arrays are contiguous, of one floating type: `u, delta, dy (batch, L, D)`, `rates (n, D)`, which is A log2(e),
`B, C (batch, L, n)`, states `(batch, n, D)`, borders `(chunks, batch, n, D)`. The loops over channels are innermost:
they are what the compiler turns into vector instructions.
"""

from contextlib import suppress

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

WIDTH = 512  # channels whose states are worked on together: long enough for vector loops, few enough for the caches

# What a compiler may assume: enough for sums in vectors and for fused multiply-adds, and still NaN stays NaN.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}


def _jit(function):
    """Compile it at its first call and keep the result on disk, where some directory can be written."""
    with suppress(RuntimeError):  # numba's error for "no directory for the cache"
        return numba.njit(cache=True, **_OPTIONS)(function)
    return numba.njit(**_OPTIONS)(function)


@intrinsic
def _to_bits(typingctx, x):
    return numba.int32(numba.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _from_bits(typingctx, x):
    return numba.float32(numba.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


# 2^f = 1 + c1 f + ... + c6 f^6 for |f| <= 1/2, with a relative error below 2e-9 (weighted least squares); exactly 1 at
# 0, so that the errors of slow decays do not add up.
_C = tuple(
    np.float32(c)
    for c in (6.93147203e-01, 2.40226479e-01, 5.55033247e-02, 9.61843736e-03, 1.33988745e-03, 1.53533616e-04)
)
_SHIFT = np.float32(1.5 * 2**23)  # adding it rounds to an integer and leaves that in the lowest bits
_LOWEST, _HIGHEST = np.float32(-126), np.float32(127)


# Not reassociated: (x + _SHIFT) - _SHIFT is not x.
@numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
def _exp2_single(x):
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    shifted = x + _SHIFT
    f = x - (shifted - _SHIFT)
    p = ((((_C[5] * f + _C[4]) * f + _C[3]) * f + _C[2]) * f + _C[1]) * f + _C[0]
    p = p * f + np.float32(1)
    return _from_bits(np.int32(_to_bits(p) + np.int32(_to_bits(shifted) << np.int32(23))))


def _exp2(x):
    """2^x; below 2^-126, and from 2^127, the nearest of the two."""


@overload(_exp2, inline="always")
def _exp2_overload(x):
    return (lambda x: _exp2_single(x)) if x == numba.float32 else (lambda x: np.exp2(x))


@_jit
def forward(u, delta, rates, B, C, h, y, borders, rows, columns, chunk_size):
    """Advance `h` over all steps for some rows of the batch and some columns of the channels; writes y, borders."""
    length, n = u.shape[1], rates.shape[0]
    for first in range(columns[0], columns[1], WIDTH):
        last = min(first + WIDTH, columns[1])
        width = last - first
        rate = rates[:, first:last].copy()
        state = np.empty((n, width), u.dtype)
        step, driven, out = np.empty((3, width), u.dtype)
        for i in range(rows[0], rows[1]):
            state[:] = h[i, :, first:last]
            for t in range(length):
                if t % chunk_size == 0:
                    borders[t // chunk_size, i, :, first:last] = state
                for k in range(width):
                    step[k] = delta[i, t, first + k]
                    driven[k] = step[k] * u[i, t, first + k]
                    out[k] = 0
                for j in range(n):
                    b, c = B[i, t, j], C[i, t, j]
                    for k in range(width):
                        new = _exp2(step[k] * rate[j, k]) * state[j, k] + driven[k] * b
                        state[j, k] = new
                        out[k] += new * c
                for k in range(width):
                    y[i, t, first + k] = out[k]
            h[i, :, first:last] = state


@_jit
def backward(dy, u, delta, rates, B, C, borders, dh, du, ddelta, drates, dB, dC, rows, columns, chunk_size, ln2):
    """The adjoint recurrence of some rows and columns.

    Takes `dh (batch, n, D)` from the last state to the first; writes `du` and `ddelta`; adds to `dB` and `dC`, and to
    `drates (n, D)` the gradient of A. `ln2` is the natural logarithm of 2.
    """
    length, n = u.shape[1], rates.shape[0]
    widest = min(WIDTH, columns[1] - columns[0])
    steps = min(chunk_size, length)
    states, decays = np.empty((steps + 1, n, widest), u.dtype), np.empty((steps, n, widest), u.dtype)
    rate, adjoint, drate = np.empty((3, n, widest), u.dtype)
    step, driven, dout, dstep, ddriven = np.empty((5, widest), u.dtype)
    for i in range(rows[0], rows[1]):
        for chunk in range(borders.shape[0] - 1, -1, -1):
            start = chunk * chunk_size
            count = min(length - start, chunk_size)
            for first in range(columns[0], columns[1], WIDTH):
                last = min(first + WIDTH, columns[1])
                width = last - first
                rate[:, :width] = rates[:, first:last]
                adjoint[:, :width] = dh[i, :, first:last]
                drate[:, :width] = 0  # sums of sums have smaller errors
                states[0, :, :width] = borders[chunk, i, :, first:last]
                for s in range(count):
                    t = start + s
                    for k in range(width):
                        step[k] = delta[i, t, first + k]
                        driven[k] = step[k] * u[i, t, first + k]
                    for j in range(n):
                        b = B[i, t, j]
                        for k in range(width):
                            decay = _exp2(step[k] * rate[j, k])
                            decays[s, j, k] = decay
                            states[s + 1, j, k] = decay * states[s, j, k] + driven[k] * b
                for s in range(count - 1, -1, -1):
                    t = start + s
                    for k in range(width):
                        step[k] = delta[i, t, first + k]
                        driven[k] = step[k] * u[i, t, first + k]
                        dout[k] = dy[i, t, first + k]
                        dstep[k] = 0
                        ddriven[k] = 0
                    for j in range(n):
                        b, c = B[i, t, j], C[i, t, j]
                        db = dc = ln2 - ln2  # zero, of the type of the arrays
                        for k in range(width):
                            g = adjoint[j, k] + dout[k] * c
                            dc += states[s + 1, j, k] * dout[k]
                            db += g * driven[k]
                            ddriven[k] += g * b
                            g *= decays[s, j, k]
                            adjoint[j, k] = g
                            g *= states[s, j, k]
                            dstep[k] += g * rate[j, k]
                            drate[j, k] += g * step[k]
                        dB[i, t, j] += db
                        dC[i, t, j] += dc
                    for k in range(width):
                        ddelta[i, t, first + k] = dstep[k] * ln2 + ddriven[k] * u[i, t, first + k]
                        du[i, t, first + k] = ddriven[k] * step[k]
                dh[i, :, first:last] = adjoint[:, :width]
                drates[:, first:last] += drate[:, :width]
