"""Two ranks equal one process, across reductions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import Windows, tiny_lm

SCRIPT = str(Path(__file__).parent / "ddp_script.py")


def logits(found):
    model = tiny_lm(state_size=32)
    model.load_state_dict(found["weights"])
    model.eval()
    with torch.no_grad():
        return model(Windows()[0]["input_ids"][None]).logits


@pytest.mark.parametrize("find_unused", [False, True])
def test_two_ranks_equal_one_process(tmp_path, find_unused, free_port, repo_env):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.mkdir()
    single = [sys.executable, SCRIPT, str(one), "mimo_ssm", "sgd", "8", str(find_unused)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    double = [*torchrun, SCRIPT, str(two), "mimo_ssm", "sgd", "4", str(find_unused)]
    for command in (single, double):
        subprocess.run(command, check=True, env=repo_env)
    reference, first, second = (torch.load(p) for p in (one / "rank-0.pt", two / "rank-0.pt", two / "rank-1.pt"))
    assert first["config"] == second["config"] == reference["config"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["weights"]["model.layers.0.mixer.nu_log"].shape[0] < 32
    torch.testing.assert_close(logits(first), logits(reference), rtol=0, atol=1e-4)


def test_ranks_agree_on_layers_that_each_observes_with_its_own_batches(tmp_path, free_port, repo_env):
    """Mamba-2 under AdamW: sums over the ranks, one decision, and new parameters in optimizer and reducer of both."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    command = [*torchrun, SCRIPT, str(tmp_path), "mamba2", "adamw_torch", "4", "False"]
    subprocess.run(command, check=True, env=repo_env)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert first["config"] == second["config"]
    maps = first["weights"]["backbone.layers.0.mixer.B_map"]
    assert maps.shape[1] < 32
    assert not torch.equal(maps, torch.eye(*maps.shape[1:])[None])
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_ranks_go_on_after_a_search_that_found_nothing_to_reduce(tmp_path, free_port, repo_env):
    """One rank alone has tried sizes, which touches the parameters that its reducer watches."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    command = [*torchrun, SCRIPT, str(tmp_path), "kept", "sgd", "4", "False"]
    subprocess.run(command, check=True, env=repo_env, timeout=300)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert first["weights"]["model.layers.0.mixer.nu_log"].shape == (32,)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
