"""What the tests of scans and convolutions share."""

import pytest
import torch

from hf_compressm.ops import fused


@pytest.fixture(params=["torch", "numba"])
def loops(request):
    """Once with the operations of PyTorch, and once with the compiled loops."""
    if request.param == "torch":
        with fused.disabled():
            yield
    else:
        assert fused.usable(torch.device("cpu"))
        yield
