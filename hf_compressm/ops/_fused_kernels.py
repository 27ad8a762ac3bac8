"""The loops of `fused.py`, compiled by numba when they are first called; import this where numba is installed.

All arrays are contiguous, of one floating type: `u, delta, y (batch, L, D)`, `rates (n, D)`, which is A log2(e),
`B, C (batch, L, n)`, states `(batch, n, D)`, borders `(chunks, batch, n, D)`. An argument that may be a slice of wider
rows, `z` or `x`, comes as all the memory it spans, in one dimension, with its two strides.

The loops over channels are innermost: they are what the compiler turns into vector instructions. It does so only if it
can tell which rows overlap, hence one scratch array with all rows at fixed distances, and only for indices that cannot
be negative, which numba would count from the end: hence `_U`.
"""

import zlib
from contextlib import suppress

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba.extending import intrinsic, overload

from .fused import CHUNK

WIDTH = 128  # channels worked on together
TILE = 4  # steps whose states stay in registers; CHUNK is a multiple

_U = numba.uintp
_TILES = CHUNK // TILE
_ROW = WIDTH + 16  # distances that are no power of two, which would compete for the same places in the caches

# Rows of a tile, each for TILE steps; the states have one row more, as they begin with the one before the first step.
_STEP, _DRIVEN, _DOUT, _DSTEP, _DDRIVEN, _DECAY, _STATE = (np.uint64(i * TILE * _ROW) for i in range(7))
_BLOCK = (7 * TILE + 1) * _ROW
_NEXT = np.uint64(int(_STATE) + _ROW)
_NEXT_TILE = np.uint64(int(_STATE) + _BLOCK)
_1, _2, _3 = (np.uint64(i * _ROW) for i in (1, 2, 3))
SCRATCH = (_TILES + 1) * _BLOCK  # the last tile passes its state on, too

# What a compiler may assume: enough for sums in vectors and for fused multiply-adds, and still a NaN stays one.
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
# What the compiled code depends on beside this file, whose time of change numba looks at.
_BUILD = zlib.crc32(f"{CHUNK} {get_host_cpu_name()} {get_host_cpu_features().flatten()}".encode())
_inlined = numba.njit(forceinline=True, **_OPTIONS)
# Not reassociated: (x + _SHIFT) - _SHIFT is not x.
_exact = numba.njit(forceinline=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})


def jit(function, name=None):
    """Compile `function` at its first call, and keep the result under `name` on disk, if a directory can be written.

    Numba numbers the files of one name without a lock: two processes that compile for different types at once can
    leave the code of one under the type of the other. So each combination of types has a name, on each kind of CPU.
    """
    if name is not None:
        name = f"{name}_{_BUILD:08x}"
        function = type(function)(function.__code__, function.__globals__, name)
        function.__qualname__ = name
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
_LOWEST, _FAR, _ZERO, _ONE, _LOG2E = (np.float32(c) for c in (-126, 87, 0, 1, np.log2(np.e)))
# log(1 + x) = x (l0 + l1 x + ... + l9 x^9) for 0 <= x <= 1, with a relative error below 5e-9 (the same).
_L = tuple(
    np.float32(c)
    for c in (
        *(1.0, -4.999990165e-01, 3.332996368e-01, -2.495413423e-01, 1.967594028e-01),
        *(-1.530559361e-01, 1.060365662e-01, -5.695954338e-02, 1.985146478e-02, -3.244025400e-03),
    )
)


@_exact
def _decay_single(x):
    x = _LOWEST if x < _LOWEST else x
    shifted = x + _SHIFT
    f = x - (shifted - _SHIFT)
    p = ((((_C[5] * f + _C[4]) * f + _C[3]) * f + _C[2]) * f + _C[1]) * f + _C[0]
    p = p * f + _ONE
    return _from_bits(np.int32(_to_bits(p) + np.int32(_to_bits(shifted) << np.int32(23))))


@_inlined
def _exp_single(x):
    """e^-|x|, exactly 0 where float32 has no normal number for it."""
    return _ZERO if abs(x) > _FAR else _decay_single(-abs(x) * _LOG2E)


@_inlined
def _softplus_single(x):
    e = _exp_single(x)
    p = (((_L[9] * e + _L[8]) * e + _L[7]) * e + _L[6]) * e + _L[5]
    p = ((((p * e + _L[4]) * e + _L[3]) * e + _L[2]) * e + _L[1]) * e + _L[0]
    return (x if x > _ZERO else _ZERO) + p * e


@_inlined
def _sigmoid_single(x):
    e = _exp_single(x)
    return (e if x < _ZERO else _ONE) / (_ONE + e)


def _by_type(single, double):
    """A function for compiled code that is `single` for float32 and `double` for float64."""

    def function(x):
        return double(x)

    overload(function, inline="always")(
        lambda x: (lambda x: single(x)) if x == numba.float32 else (lambda x: double(x))
    )
    return function


_decay = _by_type(_decay_single, _inlined(lambda x: np.exp2(x)))  # 2^x for x <= 0; below 2^-126 it may be that
_sigmoid = _by_type(_sigmoid_single, _inlined(lambda x: 1 / (1 + np.exp(-x))))
# PyTorch's softplus is the identity from 20 on, which float32 cannot tell from the exact one.
_softplus = _by_type(_softplus_single, _inlined(lambda x: x if x > 20 else np.log1p(np.exp(x))))
_softplus_slope = _by_type(_sigmoid_single, _inlined(lambda x: 1.0 if x > 20 else 1 / (1 + np.exp(-x))))


@_inlined
def _drive(w, u, delta, bias, i, start, count, first, width):
    """Fill the rows of the steps and of what drives the states; zero after the last step of the sequence."""
    for s in range(CHUNK):
        o = s // TILE * _BLOCK + s % TILE * _ROW
        if s < count:
            for k in range(width):
                at = _U(o + k)
                channel = _U(first + k)
                step = _softplus(delta[_U(i), _U(start + s), channel] + bias[channel])
                w[_STEP + at] = step
                w[_DRIVEN + at] = step * u[_U(i), _U(start + s), channel]
        else:
            for k in range(WIDTH):
                w[_STEP + _U(o + k)] = 0
                w[_DRIVEN + _U(o + k)] = 0


@_inlined
def _transpose(x, i, start, count, rows):
    """Fill `rows (n CHUNK,)` with steps of `x (batch, L, n)`, all steps of one state side by side, and zeros."""
    if count < CHUNK:
        rows[:] = 0
    for s in range(count):
        for j in range(x.shape[2]):
            rows[_U(j * CHUNK + s)] = x[_U(i), _U(start + s), _U(j)]


@_inlined
def _step_forward(w, at, x, rate, b, c):
    x = _decay(w[_STEP + at] * rate) * x + w[_DRIVEN + at] * b
    w[_DOUT + at] += x * c
    return x


@_inlined
def _advance(w, o, state, rate, j, b, c, s):
    """A tile of the forward pass, for one of the n states of each channel."""
    b0, b1, b2, b3 = b[_U(s)], b[_U(s + 1)], b[_U(s + 2)], b[_U(s + 3)]
    c0, c1, c2, c3 = c[_U(s)], c[_U(s + 1)], c[_U(s + 2)], c[_U(s + 3)]
    for k in range(WIDTH):
        at, own = _U(o + k), _U(j * WIDTH + k)
        x, r = state[own], rate[own]
        x = _step_forward(w, at, x, r, b0, c0)
        x = _step_forward(w, at + _1, x, r, b1, c1)
        x = _step_forward(w, at + _2, x, r, b2, c2)
        state[own] = _step_forward(w, at + _3, x, r, b3, c3)


def scan_forward(inputs, outputs, scratch, z_strides, rows, columns):
    """Advance `h` over all steps for some rows of the batch and some columns of the channels.

    Writes `out`, `y`, which is `out` before the gate, and `borders`.
    """
    u, delta, rates, B, C, D, z, bias = inputs
    h, out, y, borders = outputs
    w, state, rate = scratch
    length, n = u.shape[1], rates.shape[0]
    b, c = np.zeros((2, n * CHUNK), u.dtype)
    for first in range(columns[0], columns[1], WIDTH):
        width = min(WIDTH, columns[1] - first)
        w[:], state[:], rate[:] = 0, 0, 0
        for j in range(n):
            rate[j * WIDTH : j * WIDTH + width] = rates[j, first : first + width]
        for i in range(rows[0], rows[1]):
            for j in range(n):
                state[j * WIDTH : j * WIDTH + width] = h[i, j, first : first + width]
            for start in range(0, length, CHUNK):
                count = min(CHUNK, length - start)
                _drive(w, u, delta, bias, i, start, count, first, width)
                for s in range(CHUNK):
                    o = s // TILE * _BLOCK + s % TILE * _ROW
                    for k in range(WIDTH):
                        w[_DOUT + _U(o + k)] = 0
                _transpose(B, i, start, count, b)
                _transpose(C, i, start, count, c)
                for j in range(n):
                    for k in range(width):
                        borders[_U(start // CHUNK), _U(i), _U(j), _U(first + k)] = state[_U(j * WIDTH + k)]
                    for tile in range(_TILES):
                        _advance(w, tile * _BLOCK, state, rate, j, b, c, j * CHUNK + tile * TILE)
                for s in range(count):
                    o = s // TILE * _BLOCK + s % TILE * _ROW
                    at_z = i * z_strides[0] + (start + s) * z_strides[1] + first
                    for k in range(width):
                        channel, gate = _U(first + k), z[_U(at_z + k)]
                        found = w[_DOUT + _U(o + k)] + u[_U(i), _U(start + s), channel] * D[channel]
                        y[_U(i), _U(start + s), channel] = found
                        out[_U(i), _U(start + s), channel] = found * gate * _sigmoid(gate)
            for j in range(n):
                h[i, j, first : first + width] = state[j * WIDTH : j * WIDTH + width]


@_inlined
def _step_again(w, at, x, rate, b):
    decay = _decay(w[_STEP + at] * rate)
    w[_DECAY + at] = decay
    x = decay * x + w[_DRIVEN + at] * b
    w[_NEXT + at] = x
    return x


@_inlined
def _recompute(w, o, rate, j, b, s):
    """Decays and states of a tile, and the first state of the next, for one of the n states of each channel."""
    b0, b1, b2, b3 = b[_U(s)], b[_U(s + 1)], b[_U(s + 2)], b[_U(s + 3)]
    for k in range(WIDTH):
        at, r = _U(o + k), rate[_U(j * WIDTH + k)]
        x = _step_again(w, at, w[_STATE + at], r, b0)
        x = _step_again(w, at + _1, x, r, b1)
        x = _step_again(w, at + _2, x, r, b2)
        w[_NEXT_TILE + at] = _step_again(w, at + _3, x, r, b3)


@_inlined
def _step_back(w, at, g, drate, rate, b, c):
    """The adjoint before a step from that after it, the sum for A, and the terms of the gradients of B and C."""
    dout = w[_DOUT + at]
    g += dout * c
    db = g * w[_DRIVEN + at]
    w[_DDRIVEN + at] += g * b
    g *= w[_DECAY + at]
    dlog = g * w[_STATE + at]  # gradient of the logarithm of the decay
    w[_DSTEP + at] += dlog * rate
    return g, drate + dlog * w[_STEP + at], db, w[_NEXT + at] * dout


@_inlined
def _return(w, o, adjoint, rate, drate, j, b, c, s):
    """A tile of the backward pass; gives the sums over the channels for dB and dC at each step."""
    b0, b1, b2, b3 = b[_U(s)], b[_U(s + 1)], b[_U(s + 2)], b[_U(s + 3)]
    c0, c1, c2, c3 = c[_U(s)], c[_U(s + 1)], c[_U(s + 2)], c[_U(s + 3)]
    db0 = db1 = db2 = db3 = dc0 = dc1 = dc2 = dc3 = w.dtype.type(0)
    for k in range(WIDTH):
        at, own = _U(o + k), _U(j * WIDTH + k)
        g, r, dr = adjoint[own], rate[own], drate[own]
        g, dr, x, y = _step_back(w, at + _3, g, dr, r, b3, c3)
        db3 += x
        dc3 += y
        g, dr, x, y = _step_back(w, at + _2, g, dr, r, b2, c2)
        db2 += x
        dc2 += y
        g, dr, x, y = _step_back(w, at + _1, g, dr, r, b1, c1)
        db1 += x
        dc1 += y
        g, dr, x, y = _step_back(w, at, g, dr, r, b0, c0)
        db0 += x
        dc0 += y
        adjoint[own], drate[own] = g, dr
    return (db0, db1, db2, db3), (dc0, dc1, dc2, dc3)


@_inlined
def _enter(w, dout, y, z, z_strides, dz, i, start, count, first, width):
    """Gradients behind the gate, that of the gate itself, and zeros where sums are to be."""
    for s in range(CHUNK):
        o = s // TILE * _BLOCK + s % TILE * _ROW
        for k in range(WIDTH):
            w[_DOUT + _U(o + k)] = 0
            w[_DSTEP + _U(o + k)] = 0
            w[_DDRIVEN + _U(o + k)] = 0
        if s < count:
            at_z = i * z_strides[0] + (start + s) * z_strides[1] + first
            for k in range(width):
                channel, gate = _U(first + k), z[_U(at_z + k)]
                open_ = _sigmoid(gate)
                d = dout[_U(i), _U(start + s), channel]
                silu = gate * open_
                w[_DOUT + _U(o + k)] = d * silu
                slope = open_ + silu - silu * open_
                dz[_U(i), _U(start + s), channel] = d * y[_U(i), _U(start + s), channel] * slope


@_inlined
def _leave(w, u, delta, bias, D, du, ddelta, dD, dbias, i, start, count, first, width, ln2):
    """Gradients of the inputs of the chunk from the sums over the n states."""
    for s in range(count):
        o = s // TILE * _BLOCK + s % TILE * _ROW
        for k in range(width):
            at, channel = _U(o + k), _U(first + k)
            x, d = u[_U(i), _U(start + s), channel], w[_DOUT + at]
            slope = _softplus_slope(delta[_U(i), _U(start + s), channel] + bias[channel])
            dstep = (w[_DSTEP + at] * ln2 + w[_DDRIVEN + at] * x) * slope
            ddelta[_U(i), _U(start + s), channel] = dstep
            du[_U(i), _U(start + s), channel] = w[_DDRIVEN + at] * w[_STEP + at] + d * D[channel]
            dbias[channel] += dstep
            dD[channel] += d * x


def scan_backward(inputs, gradients, scratch, z_strides, rows, columns, ln2):
    """The adjoint recurrence of some rows and columns, from the last step to the first.

    Takes `dh` from after the last step to before the first; writes `du`, `ddelta` and `dz`; adds to the others, of
    which `drates` is the gradient of A. `ln2` is the natural logarithm of 2.
    """
    dout, u, delta, rates, B, C, D, z, bias, y, borders = inputs
    dh, du, ddelta, drates, dB, dC, dD, dz, dbias = gradients
    w, adjoint, rate, drate = scratch
    length, n = u.shape[1], rates.shape[0]
    b, c = np.zeros((2, n * CHUNK), u.dtype)
    for first in range(columns[0], columns[1], WIDTH):
        width = min(WIDTH, columns[1] - first)
        w[:], rate[:] = 0, 0
        for j in range(n):
            rate[j * WIDTH : j * WIDTH + width] = rates[j, first : first + width]
        for i in range(rows[0], rows[1]):
            adjoint[:], drate[:] = 0, 0
            for j in range(n):
                adjoint[j * WIDTH : j * WIDTH + width] = dh[i, j, first : first + width]
            for chunk in range(borders.shape[0]):
                chunk = borders.shape[0] - 1 - chunk
                start = chunk * CHUNK
                count = min(CHUNK, length - start)
                _drive(w, u, delta, bias, i, start, count, first, width)
                _enter(w, dout, y, z, z_strides, dz, i, start, count, first, width)
                _transpose(B, i, start, count, b)
                _transpose(C, i, start, count, c)
                for j in range(n):
                    for k in range(width):
                        w[_STATE + _U(k)] = borders[_U(chunk), _U(i), _U(j), _U(first + k)]
                    for tile in range(_TILES):
                        _recompute(w, tile * _BLOCK, rate, j, b, j * CHUNK + tile * TILE)
                    for tile in range(_TILES):
                        s = CHUNK - TILE - tile * TILE
                        db, dc = _return(w, s // TILE * _BLOCK, adjoint, rate, drate, j, b, c, j * CHUNK + s)
                        for at in range(min(TILE, count - s)):
                            dB[_U(i), _U(start + s + at), _U(j)] += db[at]
                            dC[_U(i), _U(start + s + at), _U(j)] += dc[at]
                _leave(w, u, delta, bias, D, du, ddelta, dD, dbias, i, start, count, first, width, ln2)
            for j in range(n):
                dh[i, j, first : first + width] = adjoint[j * WIDTH : j * WIDTH + width]
                for k in range(width):
                    drates[j, first + k] += drate[j * WIDTH + k]


@_inlined
def _convolve(x, at_x, row_stride, weight, bias, t, first, width, total):
    """Fill `total (WIDTH,)` with the convolution at step `t`; channel `first` of step 0 is at `x[at_x]`."""
    for k in range(width):
        total[_U(k)] = bias[_U(first + k)]
    for tap in range(weight.shape[0]):
        source = t - (weight.shape[0] - 1) + tap
        if source >= 0:
            at = at_x + source * row_stride
            for k in range(width):
                total[_U(k)] += x[_U(at + k)] * weight[_U(tap), _U(first + k)]


def conv_forward(inputs, y, total, strides, rows, columns):
    """Writes some rows and columns of `y`, the SiLU of the convolution, with `weight (taps, D)`."""
    x, weight, bias = inputs
    for first in range(columns[0], columns[1], WIDTH):
        width = min(WIDTH, columns[1] - first)
        for i in range(rows[0], rows[1]):
            for t in range(y.shape[1]):
                _convolve(x, i * strides[0] + first, strides[1], weight, bias, t, first, width, total)
                for k in range(width):
                    z = total[_U(k)]
                    y[_U(i), _U(t), _U(first + k)] = z * _sigmoid(z)


def conv_backward(inputs, gradients, total, strides, rows, columns):
    """Adds to `dx (batch, L, D)`, `dweight (taps, D)` and `dbias (D,)`."""
    dy, x, weight, bias = inputs
    dx, dweight, dbias = gradients
    taps = weight.shape[0]
    for first in range(columns[0], columns[1], WIDTH):
        width = min(WIDTH, columns[1] - first)
        for i in range(rows[0], rows[1]):
            at_x = i * strides[0] + first
            for t in range(dy.shape[1]):
                _convolve(x, at_x, strides[1], weight, bias, t, first, width, total)
                for k in range(width):
                    z = total[_U(k)]
                    slope = _sigmoid(z)
                    silu = z * slope
                    d = dy[_U(i), _U(t), _U(first + k)] * (slope + silu - silu * slope)
                    total[_U(k)] = d
                    dbias[_U(first + k)] += d
                for tap in range(taps):
                    source = t - (taps - 1) + tap
                    if source >= 0:
                        at = at_x + source * strides[1]
                        for k in range(width):
                            channel = _U(first + k)
                            dx[_U(i), _U(source), channel] += total[_U(k)] * weight[_U(tap), channel]
                            dweight[_U(tap), channel] += total[_U(k)] * x[_U(at + k)]
