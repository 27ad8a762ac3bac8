"""Second thoughts, resumed runs and dead processes on several ranks."""

import shutil
import subprocess
import sys
import time

import ddp_life
import pytest
import torch
from ddp_runs import make_model
from tiny import Windows, tiny_lm

from hf_compressm import CompressionReport
from hf_compressm.training.checkpoint import find_damage


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("one_process")
    return ddp_life.run(path, ddp_life.PLAIN), path


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_process, repo_env):
    """What one launch leaves: the last thing in it is that a rank dies."""
    output = tmp_path_factory.mktemp("two_ranks")
    for step in (5, 6):  # `resumed` starts from a run of one process, killed in its last save
        shutil.copytree(one_process[1] / f"checkpoint-{step}", output / "resumed" / f"checkpoint-{step}")
    (output / "resumed" / "checkpoint-6" / "trainer_state.json").unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    started = time.monotonic()
    done = subprocess.run(
        [*torchrun, ddp_life.__file__, str(output)], env=repo_env, timeout=300, capture_output=True, text=True
    )
    return output, done, time.monotonic() - started


def weights(output, name):
    first, second = (torch.load(output / f"{name}-{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    return first


def logits(state):
    model = tiny_lm(state_size=32)
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(Windows()[0]["input_ids"][None]).logits


def assert_close(one, other):
    """Where no basis was chosen anew, which rounding may turn another way."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-4, msg=key)


def test_both_ranks_go_back_as_one_process_does(two_ranks, tmp_path):
    output, *_ = two_ranks
    (event,) = CompressionReport.load(output / "judged").events
    assert event.rolled_back_at == 10
    found = weights(output, "judged")
    assert found["model.layers.0.mixer.nu_log"].shape == (32,)
    assert_close(found, ddp_life.run(tmp_path, ddp_life.JUDGED).model.state_dict())


def test_a_snapshot_is_handed_out_only_to_ranks_that_cannot_read_it(two_ranks):
    output, *_ = two_ranks
    assert CompressionReport.load(output / "apart").events[0].rolled_back_at == 10
    found, expected = weights(output, "apart"), weights(output, "judged")
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    for rank in (0, 1):
        types = torch.load(output / f"types-{rank}.pt")
        assert types["judged"]
        assert ("Snapshot" in types["judged"], "Snapshot" in types["apart"]) == (False, True)


def test_one_process_goes_on_where_two_were_waiting_for_a_decision(two_ranks, tmp_path):
    output, *_ = two_ranks
    checkpoint = output / "judged" / "checkpoint-9"
    assert find_damage(checkpoint) == ""
    trainer = ddp_life.run(tmp_path, ddp_life.JUDGED, resume=str(checkpoint))
    assert CompressionReport.load(tmp_path).events[0].rolled_back_at == 10
    assert_close(trainer.model.state_dict(), weights(output, "judged"))


def test_one_process_goes_on_with_what_two_had_observed(two_ranks, tmp_path, caplog):
    """From within the window of four steps before the reduction at step 7."""
    output, *_ = two_ranks
    checkpoint = output / "seen" / "checkpoint-5"
    assert (checkpoint / "compressm_calibration_1.safetensors").is_file()
    ddp_life.run(tmp_path, ddp_life.PLAIN, str(checkpoint), make_model("reducible_mamba"))
    assert "No calibration sums" not in caplog.text
    one, two = (CompressionReport.load(path).events[0] for path in (tmp_path, output / "seen"))
    assert one.changed
    for layer, expected in zip(one.layers, two.layers, strict=True):
        values = (torch.tensor(layer.hankel_singular_values), torch.tensor(expected.hankel_singular_values))
        torch.testing.assert_close(*values, rtol=1e-4, atol=0)


def test_two_ranks_go_on_where_one_process_was_killed(two_ranks, one_process):
    output, *_ = two_ranks
    found = weights(output, "resumed")
    assert max(found["model.layers.0.mixer.nu_log"].shape) < 32
    rounded, expected = (logits(state) for state in (found, one_process[0].model.state_dict()))
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_without_the_files_of_a_rank_is_not_whole(two_ranks, tmp_path):
    checkpoint = shutil.copytree(two_ranks[0] / "judged" / "checkpoint-9", tmp_path / "checkpoint-9")
    (checkpoint / "rng_state_1.pth").unlink()
    assert find_damage(checkpoint) == "rng_state_1.pth is missing"


def test_a_rank_that_dies_ends_the_launch(two_ranks):
    output, done, seconds = two_ranks
    assert done.returncode != 0
    assert "exitcode  : 13" in done.stderr
    assert seconds < 200
    assert not (output / "survived").exists()
