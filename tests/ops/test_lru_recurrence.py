"""Which implementation of the recurrence runs; the module of kernels is a stand-in, with Triton installed or not."""

import sys
from types import SimpleNamespace

import pytest
import torch
from ops.scans import make_lru_inputs
from torch._subclasses import FakeTensorMode

from hf_compressm import ops
from hf_compressm.ops import lru_scan
from hf_compressm.ops.lru_recurrence import Recurrence, recurrence_on

lru = sys.modules[lru_scan.__module__]
CUDA = torch.device("cuda")


@pytest.fixture
def kernels(monkeypatch):
    """In place of `_lru_triton`; the choice is made anew."""
    stand_in = SimpleNamespace(check=lambda device: None, FusedRecurrence=type("FusedRecurrence", (), {}))
    monkeypatch.setattr(ops, "_lru_triton", stand_in, raising=False)
    recurrence_on.cache_clear()
    yield stand_in
    recurrence_on.cache_clear()


def raising(error):
    def check(device):
        raise error

    return check


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "failing"])
def test_without_triton_the_steps_run_in_pytorch(kernels, monkeypatch, caplog, missing):
    if missing:
        monkeypatch.delattr(ops, "_lru_triton")
        monkeypatch.setitem(sys.modules, "hf_compressm.ops._lru_triton", None)
    else:
        kernels.check = raising(RuntimeError("Failed to find C compiler"))
    assert recurrence_on(torch.device("cpu")) is Recurrence
    assert not caplog.records
    assert recurrence_on(CUDA) is recurrence_on(CUDA) is Recurrence
    (record,) = caplog.records
    assert "runs step by step in PyTorch" in record.getMessage()
    assert missing or "Failed to find C compiler" in record.getMessage()


def test_a_full_gpu_says_nothing_of_triton(kernels, caplog):
    check, kernels.check = kernels.check, raising(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        recurrence_on(CUDA)
    kernels.check = check
    assert recurrence_on(CUDA) is kernels.FusedRecurrence
    assert not caplog.records


def test_on_a_gpu_the_kernels_run_over_long_chunks(kernels, monkeypatch):
    assert recurrence_on(CUDA) is kernels.FusedRecurrence
    chunks = []
    scan = lru._scan
    monkeypatch.setattr(lru, "_scan", lambda *args: chunks.append(args[-1]) or scan(*args))
    inputs = make_lru_inputs(2, 40, 3, 2, 2, dtype=torch.float32)
    lru_scan(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x.detach()) for x in inputs]
        lru_scan(*(torch.empty_like(x, device="cuda") for x in fakes))
    assert chunks == [lru.CHUNK_SIZE, lru.GPU_CHUNK_SIZE]
