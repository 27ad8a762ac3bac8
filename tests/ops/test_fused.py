"""What concerns the compiled loops alone; that they compute the right thing is in test_gated_scan.py."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba.core import caching, config
from ops.scans import assert_same, gated_inputs, gated_outputs_and_gradients, to_float32

from hf_compressm import ops
from hf_compressm.ops import _fused_kernels, causal_conv, fused, gated_scan, gated_scan_reference


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 5], indirect=True)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_threads_change_nothing(threads, batch):
    inputs = gated_inputs(batch, 40, 7, 4)
    expected = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), expected, 1e-12)


@pytest.mark.parametrize("channels", [127, 128, 300])
def test_channels_beyond_one_block(channels):
    inputs = gated_inputs(2, 20, channels, 2)
    expected = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), expected, 1e-12)
    single = gated_outputs_and_gradients(gated_scan, to_float32(inputs))
    assert_same([x.double() for x in single], expected, 1e-5)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 6, 8])
@pytest.mark.parametrize(("length", "channels"), [(20, 8), (20, 128), (32, 8)])
def test_not_a_number_stays_in_its_sequence(length, channels, position):
    inputs = gated_inputs(3, length, channels, 2)
    with torch.no_grad():
        inputs[position][0] = float("nan")
    y, h_last = gated_scan(*inputs)
    assert not y[1:].isnan().any()
    assert not h_last[1:].isnan().any()
    own = [position for position, x in enumerate(inputs) if len(x) == 3]
    gradients = torch.autograd.grad(y[1:].sum() + h_last[1:].sum(), [inputs[position] for position in own])
    assert not any(gradient[1:].isnan().any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("position", range(9))
def test_not_a_number_stays_one(position, dtype):
    inputs = [x.detach().to(dtype) for x in gated_inputs(1, 10, 3, 2)]
    inputs[position].fill_(float("nan"))
    y, h_last = gated_scan(*inputs)
    assert y.isnan().all()
    assert position in (4, 5, 6) or h_last.isnan().all()  # C, D and z are not in the state
    row = inputs[position].reshape(1, -1, 1)
    assert causal_conv(row, torch.ones(1, 4, dtype=dtype), activation="silu").isnan().all()


def _scan_in_child(queue):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    queue.put([x.detach().numpy() for x in gated_outputs_and_gradients(gated_scan, gated_inputs(2, 9, 3, 2))])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_forked_process_scans_too():
    gated_outputs_and_gradients(gated_scan, gated_inputs(2, 9, 3, 2))  # whatever starts in the parent has started
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(queue,))
    child.start()
    found = queue.get(timeout=60)
    child.join(60)
    torch.manual_seed(0)
    expected = gated_outputs_and_gradients(gated_scan_reference, gated_inputs(2, 9, 3, 2))
    assert_same([torch.from_numpy(x) for x in found], expected, 1e-12)


def double(x):
    x[0] *= 2


def test_no_directory_for_the_cache(monkeypatch):
    # As root any directory can be written, so numba is told that none can.
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    x = np.ones(1)
    _fused_kernels.jit(double, "double")(x)
    assert x[0] == 2


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Kernels not compiled yet, and a directory of their own to keep them in."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(_fused_kernels, "double", double, raising=False)
    return tmp_path


def run_double():
    x = np.ones(1)
    fused._run("double", torch.float64, [(x,)])
    return x[0]


def test_disk_is_full(monkeypatch, own_cache, caplog):
    def save(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(caching.Cache, "save_overload", save)
    assert run_double() == 2
    assert "numba's cache is of no use (No space left on device)" in caplog.text


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_files(own_cache, kind, monkeypatch, caplog):
    assert run_double() == 2
    (file,) = own_cache.rglob(f"*.{kind}")
    file.write_bytes(file.read_bytes()[:20])
    fused._compiled.clear()
    assert [run_double(), run_double()] == [2, 2]
    assert len(caplog.records) == 1
    assert "numba's cache is of no use" in caplog.text


def test_processes_that_compile_at_once_do_not_mix_up_their_types(monkeypatch, tmp_path):
    """Both see no file of the other, and the one whose index stays writes its code first."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_load_index", lambda self: {})
        patch.setattr(caching.IndexDataCacheFile, "_save_data", lambda *args: written.append(args))
        for dtype in ("float32", "float64"):
            _fused_kernels.jit(double, f"double_{dtype}")(np.ones(1, dtype))
    for cache, name, data in reversed(written):
        cache._save_data(name, data)
    for dtype in ("float32", "float64"):
        x = np.ones(1, dtype)
        kernel = _fused_kernels.jit(double, f"double_{dtype}")
        kernel(x)
        assert x[0] == 2
        assert kernel.stats.cache_hits


def test_an_operator_that_is_called_first(monkeypatch):
    """As by an exported program, which nobody has asked whether the loops are usable."""
    monkeypatch.setattr(fused, "_kernels", None)
    x = torch.randn(1, 5, 3)
    y = torch.ops.hf_compressm.causal_conv_silu(x, torch.ones(1, 3), torch.zeros(3))
    torch.testing.assert_close(y, torch.nn.functional.silu(x))


def test_numba_that_cannot_be_imported(monkeypatch, caplog):
    inputs = gated_inputs(1, 9, 3, 2)
    monkeypatch.setattr(fused, "_kernels", None)
    monkeypatch.setattr(fused, "_allowed", True)
    monkeypatch.delattr(ops, "_fused_kernels")
    monkeypatch.setitem(sys.modules, _fused_kernels.__name__, None)
    assert not fused.usable(torch.device("cpu"))
    assert "cannot be used" in caplog.text
    expected = gated_outputs_and_gradients(gated_scan_reference, inputs)
    assert_same(gated_outputs_and_gradients(gated_scan, inputs), expected, 1e-12)
    assert len(caplog.records) == 1  # it does not try again


SCRIPT = """
import torch
from hf_compressm.ops import _fused_kernels, causal_conv, fused, gated_scan, gated_scan_reference
torch.manual_seed(0)
shapes = [(1, 4, 3), (1, 4, 3), (3, 2), (1, 4, 2), (1, 4, 2), (3,), (1, 4, 3), (3,)]
inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
inputs[2] = (-inputs[2].detach().abs()).requires_grad_()
y, expected = gated_scan(*inputs)[0], gated_scan_reference(*inputs)[0]
torch.testing.assert_close(y, expected)
gradients = torch.autograd.grad(y.sum(), inputs)
torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), inputs))
causal_conv(inputs[0], inputs[2], activation="silu").sum().backward()
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
    assert len(list(tmp_path.rglob("*.nbc"))) == 4  # scan and convolution, forward and backward, in float32
    subprocess.run([sys.executable, "-c", NO_COMPILER + SCRIPT], env=env, check=True)
