"""What every test gets: no network, one thread, the same random numbers."""

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}

# Hugging Face's libraries read these when they are imported, which the test modules do after this file.
os.environ.update(OFFLINE)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # as does Triton: then its kernels run on the CPU, in numpy
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_env(tmp_path_factory) -> dict[str, str]:
    """The environment of a subprocess: this checkout and the tests' helpers to import, and a cache of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
