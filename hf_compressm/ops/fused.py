"""The selective scan as one compiled loop, where numba is installed: `pip install hf-compressm[numba]`.

The same arguments and results as the passes of `selective_scan.py` in PyTorch, which stand in wherever this is not
`usable`. The compiled code is kept on disk, beside this file or in the user's cache, so that later processes start at
once. Work is spread over as many threads of its own as `torch.get_num_threads()`, which a forked process has too.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_allowed = True
_kernels: ModuleType | None = None


def usable(device: torch.device) -> bool:
    """Whether scans on this device run in compiled loops."""
    return device.type == "cpu" and _allowed and importlib.util.find_spec("numba") is not None and _load()


def _load() -> bool:
    """Import the kernels; without success, warn and do not try again."""
    global _allowed, _kernels
    if _kernels is None:
        try:
            from . import _fused_kernels
        except Exception as error:  # whatever keeps numba from being imported, PyTorch can do
            _allowed = False
            logger.warning("numba is installed but cannot be used (%s): the scan of Mamba runs in PyTorch", error)
            return False
        _kernels = _fused_kernels
    return True


@contextmanager
def disabled() -> Iterator[None]:
    """Run the scans of this process in PyTorch alone."""
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
    columns = max(1, min(torch.get_num_threads() // rows, channels))
    return [(*r, *c) for r in enumerate(bounds(batch, rows)) for c in enumerate(bounds(channels, columns))]


def _run(kernel: Callable, calls: list[tuple]) -> None:
    """Call `kernel` on each tuple of arguments, all at once."""

    def call(args: tuple) -> None:
        try:
            kernel(*args)
        except OSError as error:  # the loop is compiled, and only could not be kept on disk
            logger.warning("numba cannot write its cache (%s): the scan is compiled anew in each process", error)
            kernel(*args)

    if len(calls) == 1:
        call(calls[0])
    else:
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(call, calls))


def _arrays(dtype: torch.dtype, *tensors: torch.Tensor) -> list:
    return [x.detach().to(dtype).contiguous().numpy() for x in tensors]


def forward(u, delta, A, B, C, h0, borders, h_last, y, chunk_size: int) -> None:
    """Fill `borders`, `h_last` and `y`; A and the states have the channels last, as everywhere in `_scan`."""
    h_last.zero_() if h0 is None else h_last.copy_(h0)
    out = y if y.dtype == A.dtype else torch.empty_like(y, dtype=A.dtype)
    inputs = _arrays(A.dtype, u, delta, A * math.log2(math.e), B, C)
    outputs = (h_last.numpy(), out.numpy(), borders.numpy())
    calls = [(*inputs, *outputs, rows, columns, chunk_size) for _, rows, _, columns in _shares(u.shape[0], u.shape[2])]
    _run(_kernels.forward, calls)
    if out is not y:
        y.copy_(out)


def backward(dy, dh_last, u, delta, A, B, C, borders, chunk_size: int) -> list[torch.Tensor]:
    """Gradients of u, delta, A, B, C and h0, in the dtype of the state."""
    shares = _shares(u.shape[0], u.shape[2])
    dh = dh_last.clone(memory_format=torch.contiguous_format)
    du, ddelta = (torch.empty(u.shape, dtype=A.dtype) for _ in range(2))
    # Threads add to sums of their own.
    dA = A.new_zeros(1 + shares[-1][0], *A.shape)
    dB, dC = (A.new_zeros(1 + shares[-1][2], *x.shape) for x in (B, C))
    inputs = _arrays(A.dtype, dy, u, delta, A * math.log2(math.e), B, C, borders)
    ln2 = A.new_tensor(math.log(2)).numpy()[()]
    outputs = [x.numpy() for x in (dh, du, ddelta)]
    calls = [
        (*inputs, *outputs, dA[r].numpy(), dB[c].numpy(), dC[c].numpy(), rows, columns, chunk_size, ln2)
        for r, rows, c, columns in shares
    ]
    _run(_kernels.backward, calls)
    return [du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dh]
