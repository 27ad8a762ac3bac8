"""What concerns the compiled loops alone; that they compute the scan is in test_selective_scan.py."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba.core import caching, config
from ops.scans import assert_same, outputs_and_gradients, steps_between, to_float32

from hf_compressm import ops
from hf_compressm.ops import _fused_kernels, fused, selective_scan, selective_scan_reference


def make_inputs(batch, length, channels, n):
    shapes = [(batch, length, n), (batch, length, n), (batch, channels, n)]
    tensors = [torch.randn(batch, length, channels, dtype=torch.float64)]
    tensors += [steps_between(1e-2, 2, batch, length, channels), -4 * torch.rand(channels, n, dtype=torch.float64)]
    tensors += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_() for x in tensors]


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 5], indirect=True)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_threads_change_nothing(threads, batch):
    inputs = make_inputs(batch, 40, 7, 4)
    expected = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), expected, 1e-12)


@pytest.mark.parametrize("channels", [511, 512, 1100])
def test_channels_beyond_one_tile(channels):
    inputs = make_inputs(2, 20, channels, 2)
    expected = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), expected, 1e-12)
    single = outputs_and_gradients(selective_scan, to_float32(inputs))
    assert_same([x.double() for x in single], expected, 1e-5)


@pytest.mark.parametrize("position", range(6))
def test_not_a_number_stays_one(position):
    inputs = to_float32(make_inputs(1, 10, 3, 2))
    with torch.no_grad():
        inputs[position].fill_(float("nan"))
    y, h_last = selective_scan(*inputs)
    assert y.isnan().all()
    assert position == 4 or h_last.isnan().all()  # C is not in the state


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_do(batch):
    inputs = make_inputs(batch, 0 if batch else 5, 3, 2)
    y, _, *gradients = outputs_and_gradients(selective_scan, inputs)
    assert y.shape == inputs[0].shape
    assert not gradients[2].any()  # of A


def _scan_in_child(queue):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    queue.put([x.detach().numpy() for x in outputs_and_gradients(selective_scan, make_inputs(2, 9, 3, 2))])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_forked_process_scans_too():
    outputs_and_gradients(selective_scan, make_inputs(2, 9, 3, 2))  # whatever starts in the parent has started
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    torch.manual_seed(0)
    expected = outputs_and_gradients(selective_scan_reference, make_inputs(2, 9, 3, 2))
    assert_same([torch.from_numpy(x) for x in found], expected, 1e-12)


def double(x):
    x[0] *= 2


def test_no_directory_for_the_cache(monkeypatch):
    # As root any directory can be written, so numba is told that none can.
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    x = np.ones(1)
    _fused_kernels._jit(double)(x)
    assert x[0] == 2


def test_disk_is_full(monkeypatch, tmp_path, caplog):
    def save(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(caching.Cache, "save_overload", save)
    x = np.ones(1)
    fused._run(_fused_kernels._jit(double), [(x,)])
    assert x[0] == 2
    assert "numba cannot write its cache (No space left on device)" in caplog.text


def test_numba_that_cannot_be_imported(monkeypatch, caplog):
    inputs = make_inputs(1, 9, 3, 2)
    monkeypatch.setattr(fused, "_kernels", None)
    monkeypatch.setattr(fused, "_allowed", True)
    monkeypatch.delattr(ops, "_fused_kernels")
    monkeypatch.setitem(sys.modules, _fused_kernels.__name__, None)
    assert not fused.usable(torch.device("cpu"))
    assert "cannot be used" in caplog.text
    expected = outputs_and_gradients(selective_scan_reference, inputs)
    assert_same(outputs_and_gradients(selective_scan, inputs), expected, 1e-12)
    assert len(caplog.records) == 1  # it does not try again


SCRIPT = """
import torch
from hf_compressm import ops
from hf_compressm.ops import _fused_kernels, fused, selective_scan, selective_scan_reference
inputs = [x.requires_grad_() for x in (torch.randn(1, 4, 3), torch.rand(1, 4, 3), -torch.rand(3, 2))]
inputs += [torch.randn(1, 4, 2), torch.randn(1, 4, 2)]
y, expected = selective_scan(*inputs)[0], selective_scan_reference(*inputs)[0]
torch.testing.assert_close(y, expected)
gradients = torch.autograd.grad(y.sum(), inputs[:3])
torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs[:3]))
"""
NO_COMPILER = """
from numba.core import compiler
def compile_extra(*args, **kwargs): raise AssertionError("compiled anew")
compiler.compile_extra = compile_extra
"""


@pytest.mark.slow
def test_the_cache_serves_later_processes(repo_env, tmp_path):
    env = repo_env | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT], env=env, check=True)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2  # forward and backward, in float32
    subprocess.run([sys.executable, "-c", NO_COMPILER + SCRIPT], env=env, check=True)
