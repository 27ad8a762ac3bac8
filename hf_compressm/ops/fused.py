"""The block of Mamba on the CPU in compiled loops, where numba is installed: `pip install hf-compressm[numba]`.

`gated_scan.py` and `causal_conv.py` call these where they are `usable`, and PyTorch's operations elsewhere. The
compiled code is kept on disk, beside this file or in the user's cache, so that later processes start at once. Work is
spread over as many threads of its own as `torch.get_num_threads()`, which a forked process has too.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

CHUNK = 16  # steps from one state that is stored for the backward pass to the next

_allowed = True
_kernels: ModuleType | None = None
_compiled: dict[tuple[str, torch.dtype], Callable] = {}


@torch.compiler.assume_constant_result
def usable(device: torch.device) -> bool:
    """Whether blocks on this device run in compiled loops."""
    return device.type == "cpu" and _allowed and _installed() and _try_to_load()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def _try_to_load() -> bool:
    """Without success, warn and do not try again."""
    global _allowed
    try:
        return not _load().numba.config.DISABLE_JIT
    except Exception as error:  # whatever keeps numba from being imported, PyTorch can do
        _allowed = False
        logger.warning("numba is installed but cannot be used (%s): Mamba runs in PyTorch", error)
        return False


def _load() -> ModuleType:
    """The kernels; an exported program, for one, calls for them before anybody has asked whether they are `usable`."""
    global _kernels
    if _kernels is None:
        from . import _fused_kernels

        _kernels = _fused_kernels
    return _kernels


@contextmanager
def disabled() -> Iterator[None]:
    """Let this process run in PyTorch alone, but for what torch.compile has compiled before."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def _shares(batch: int, channels: int) -> list[tuple[int, tuple[int, int], int, tuple[int, int]]]:
    """The work of each thread: index and bounds of its rows of the batch, index and bounds of its channels."""

    def bounds(size: int, parts: int) -> list[tuple[int, int]]:
        return [(size * i // parts, size * (i + 1) // parts) for i in range(parts)]

    rows = max(1, min(torch.get_num_threads(), batch))
    columns = max(1, min(torch.get_num_threads() // rows, math.ceil(channels / _load().WIDTH)))
    return [(*r, *c) for r in enumerate(bounds(batch, rows)) for c in enumerate(bounds(channels, columns))]


def _run(name: str, dtype: torch.dtype, calls: list[tuple]) -> None:
    """Call a kernel on each tuple of arguments, all at once."""

    def call(args: tuple) -> None:
        try:
            _kernel(name, dtype)(*args)
        except Exception as error:  # the loops raise none, so it came before they ran
            logger.warning("numba's cache is of no use (%s): %s is compiled anew in each process", error, name)
            _kernel(name, dtype, keep=False)(*args)

    if len(calls) == 1:
        call(calls[0])
    else:
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(call, calls))


def _kernel(name: str, dtype: torch.dtype, keep: bool = True) -> Callable:
    kernels, key = _load(), (name, dtype)
    if key not in _compiled or not keep:
        names = f"{name}_{str(dtype).removeprefix('torch.')}" if keep else None
        _compiled[key] = kernels.jit(getattr(kernels, name), names)
    return _compiled[key]


def _arrays(dtype: torch.dtype, *tensors: torch.Tensor) -> tuple:
    return tuple(x.detach().to(dtype).contiguous().numpy() for x in tensors)


def _copies(dtype: torch.dtype, *parameters: torch.Tensor) -> tuple:
    """Of what is small: FSDP2 frees the memory of parameters, which torch refuses for good once numpy has seen it."""
    return tuple(x.detach().to(dtype, copy=True).contiguous().numpy() for x in parameters)


def _rows(x: torch.Tensor, dtype: torch.dtype) -> tuple:
    """All that `x (batch, L, D)` spans, as one row of numbers, and its strides; without a copy if D is contiguous."""
    x = x.detach().to(dtype)
    if x.stride(2) != 1 or min(x.stride()) < 1:
        x = x.contiguous()
    size = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((size,), (1,)).numpy(), x.stride()[:2]


def _scratch(dtype: torch.dtype, n: int, count: int) -> tuple:
    sizes = (_load().SCRATCH, *[n * _load().WIDTH] * count)
    return tuple(torch.empty(size, dtype=dtype).numpy() for size in sizes)  # torch aligns them, numpy need not


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h, out, y, borders) -> None:
    """Advance `h`, and fill `out`, `y` and `borders`, all in the dtype of A; see `gated_scan.py`.

    A and the states have the channels last. `y` is the output before the gate, `borders` the state before each chunk.
    """
    if not u.numel():
        return
    z, strides = _rows(z, A.dtype)
    inputs = _arrays(A.dtype, u, delta, A * math.log2(math.e), B, C)
    D, delta_bias = _copies(A.dtype, D, delta_bias)
    inputs = (*inputs, D, z, delta_bias)
    outputs = tuple(x.numpy() for x in (h, out, y, borders))
    calls = [
        (inputs, outputs, _scratch(A.dtype, A.shape[0], 2), strides, rows, columns)
        for _, rows, _, columns in _shares(u.shape[0], u.shape[2])
    ]
    _run("scan_forward", A.dtype, calls)


def scan_backward(dout, dh_last, u, delta, A, B, C, D, z, delta_bias, y, borders) -> list[torch.Tensor]:
    """Gradients of all inputs in their order, and of the first state, in the dtype of the state."""
    shares = _shares(u.shape[0], u.shape[2])
    dh = dh_last.clone(memory_format=torch.contiguous_format)
    du, ddelta, dz = (torch.empty(u.shape, dtype=A.dtype) for _ in range(3))
    # Threads add to sums of their own.
    dA, dD, dbias = (A.new_zeros(1 + shares[-1][0], *x.shape) for x in (A, D, delta_bias))
    dB, dC = (A.new_zeros(1 + shares[-1][2], *x.shape) for x in (B, C))
    if u.numel():
        z, strides = _rows(z, A.dtype)
        inputs = _arrays(A.dtype, dout, u, delta, A * math.log2(math.e), B, C)
        D, delta_bias = _copies(A.dtype, D, delta_bias)
        inputs = (*inputs, D, z, delta_bias, *_arrays(A.dtype, y, borders))
        ln2 = A.new_tensor(math.log(2)).numpy()[()]
        calls = []
        for r, rows, c, columns in shares:
            gradients = tuple(x.numpy() for x in (dh, du, ddelta, dA[r], dB[c], dC[c], dD[r], dz, dbias[r]))
            calls.append((inputs, gradients, _scratch(A.dtype, A.shape[0], 3), strides, rows, columns, ln2))
        _run("scan_backward", A.dtype, calls)
    dA, dB, dC, dD, dbias = (x.sum(0) for x in (dA, dB, dC, dD, dbias))
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, dh]


def conv_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU of the convolution of `x` in the dtype of `weight (taps, D)`; see `causal_conv.py`."""
    y = torch.empty(x.shape, dtype=weight.dtype)
    if x.numel():
        flat, strides = _rows(x, weight.dtype)
        inputs = (flat, *_copies(weight.dtype, weight, bias))
        total = torch.empty(_load().WIDTH, dtype=weight.dtype)
        calls = [
            (inputs, y.numpy(), total.clone().numpy(), strides, rows, columns)
            for _, rows, _, columns in _shares(x.shape[0], x.shape[2])
        ]
        _run("conv_forward", weight.dtype, calls)
    return y


def conv_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, in the dtype of the weight."""
    shares = _shares(x.shape[0], x.shape[2])
    dx = torch.zeros(x.shape, dtype=weight.dtype)
    dweight, dbias = (weight.new_zeros(1 + shares[-1][0], *v.shape) for v in (weight, bias))
    if x.numel():
        flat, strides = _rows(x, weight.dtype)
        inputs = (*_arrays(weight.dtype, dy), flat, *_copies(weight.dtype, weight, bias))
        total = torch.empty(_load().WIDTH, dtype=weight.dtype)
        calls = [
            (inputs, (dx.numpy(), dweight[r].numpy(), dbias[r].numpy()), total.clone().numpy(), strides, rows, columns)
            for r, rows, _, columns in shares
        ]
        _run("conv_backward", weight.dtype, calls)
    return dx, dweight.sum(0), dbias.sum(0)
