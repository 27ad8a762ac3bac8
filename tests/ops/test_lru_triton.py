"""The kernels of the recurrence: in Triton's interpreter where there is no GPU, on the GPU with `-m gpu`.

What the interpreter cannot tell, whether the compiler takes the kernels, is tested without a GPU as well.
"""

import subprocess
import sys

import pytest
import torch
from ops.scans import assert_same, make_lru_inputs, make_mask, outputs_and_gradients, to_float32

from hf_compressm.ops import lru_scan, lru_scan_reference

pytest.importorskip("triton")
from hf_compressm.ops import _lru_triton
from hf_compressm.ops._lru_triton import FusedRecurrence

lru = sys.modules[lru_scan.__module__]
INTERPRETED = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here: -m gpu"))
SHAPES = [  # batch, L, N, H, P, chunk_size
    (2, 37, 5, 3, 4, 16),
    (1, 1, 1, 1, 1, 32),
    (3, 2, 27, 2, 2, 32),
    (2, 33, 16, 1, 3, 8),
    (1, 5, 70, 4, 1, 1),
    (5, 12, 3, 2, 2, 512),
]
MASKS = ["none", "all real", "right", "random", "nothing"]


@pytest.fixture(params=[INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run, and all scans with them."""
    if request.param == "cpu":
        monkeypatch.setattr(lru, "recurrence_on", lambda device: FusedRecurrence)
    assert lru.recurrence_on(torch.device(request.param, 0)) is FusedRecurrence
    return request.param


def on(device, inputs):
    """Copies of the inputs; a mask or None goes along."""
    return [x if x is None else x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]


def scanned(device, inputs, mask=None, **options):
    """Outputs and gradients of `lru_scan` on the device, back on the CPU."""
    *inputs, mask = on(device, [*inputs, mask])
    return [x.cpu() for x in outputs_and_gradients(lru_scan, inputs, mask, **options)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_reference(device, shape, kind):
    *shape, chunk_size = shape
    inputs, mask = make_lru_inputs(*shape), make_mask(kind, *shape[:2])
    expected = outputs_and_gradients(lru_scan_reference, inputs, mask)
    assert_same(scanned(device, inputs, mask, chunk_size=chunk_size), expected, 1e-12)
    single = scanned(device, to_float32(inputs), mask, chunk_size=chunk_size)
    assert_same([x.double() for x in single], expected, 1e-5)


@pytest.mark.parametrize("kind", ["none", "random"])
def test_gradcheck(device, kind):
    *inputs, mask = on(device, [*make_lru_inputs(2, 4, 1, 1, 1), make_mask(kind, 2, 4)])
    assert torch.autograd.gradcheck(lambda *args: lru_scan(*args, mask=mask, chunk_size=3), inputs)


def test_without_initial_and_final_state(device, monkeypatch):
    monkeypatch.setattr(lru, "convolution_is_faster", lambda *sizes: False)
    *inputs, _ = make_lru_inputs(3, 21, 15, 2, 2)
    y = lru_scan(*on(device, inputs), chunk_size=8, final_state=False)[0]
    expected = lru_scan_reference(*inputs)[0]
    assert_same([y.cpu()], [expected], 1e-12)


def test_a_long_sequence_in_float32(device):
    inputs = make_lru_inputs(1, 600, 8, 2, 2, radius=0.999)
    exact = outputs_and_gradients(lru_scan_reference, inputs)
    actual = scanned(device, to_float32(inputs), chunk_size=250)
    assert_same([x.double() for x in actual], exact, 1e-4)


@pytest.mark.parametrize("content", [1e30, float("nan"), float("inf")])
def test_content_of_masked_steps_changes_nothing(device, content):
    inputs, mask = make_lru_inputs(3, 20, 13, 2, 2), make_mask("random", 3, 20)
    clean = scanned(device, inputs, mask)
    with torch.no_grad():
        inputs[0][~mask] = content
    for actual, expected in zip(scanned(device, inputs, mask), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("position", range(8))
def test_not_a_number_stays_one(device, position):
    inputs = make_lru_inputs(2, 5, 3, 2, 2, dtype=torch.float32)
    with torch.no_grad():
        inputs[position].fill_(float("nan"))
    y, h_last, *gradients = scanned(device, inputs)
    assert y.isnan().all()
    assert position in (5, 6) or h_last.isnan().all()  # C is not in the state
    assert gradients[1].isnan().all()  # of lam


def test_the_same_bits_every_time_and_under_autocast(device):
    inputs, mask = make_lru_inputs(3, 12, 30, 3, 2, dtype=torch.float32), make_mask("left", 3, 12)
    first = scanned(device, inputs, mask)
    with torch.autocast(device, dtype=torch.bfloat16):
        automatic = scanned(device, inputs, mask)
    for again in (automatic, scanned(device, inputs, mask)):
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


def test_compiles_in_one_graph(device):
    *inputs, mask = on(device, [*make_lru_inputs(2, 20, 4, 3, 2, dtype=torch.float32), make_mask("left", 2, 20)])
    compiled = torch.compile(lru_scan, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(compiled, inputs, mask), outputs_and_gradients(lru_scan, inputs, mask), 1e-6)


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_compressm.ops import _lru_triton

kernels = (_lru_triton._advance, _lru_triton._retreat)
for kernel, (real, masked), chip in itertools.product(kernels, (("fp32", True), ("fp64", False)), (75, 90)):
    signature = {name: "i32" if name in _lru_triton._SIZES else f"*{real}" for name in kernel.arg_names}
    signature["live"] = "*i32" if masked else "constexpr"
    source = ASTSource(kernel, signature, constexprs={} if masked else {"live": None})
    assert triton.compile(source, GPUTarget("cuda", chip, 32), {"num_warps": 1}).asm["cubin"]
print("compiled")
"""


def test_the_compiler_takes_the_kernels(repo_env, tmp_path):
    env = {name: value for name, value in repo_env.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compiled"


def test_the_check_runs_what_a_run_would(device, monkeypatch):
    launched = []
    launch = FusedRecurrence._launch

    def record(self, kernel, tensors, live, steps):
        launched.append((kernel, live is None))
        launch(self, kernel, tensors, live, steps)

    monkeypatch.setattr(FusedRecurrence, "_launch", record)
    _lru_triton.check(torch.device(device))
    kernels = (_lru_triton._advance, _lru_triton._retreat)
    assert launched == [(kernel, unmasked) for unmasked in (True, False) for kernel in kernels]
