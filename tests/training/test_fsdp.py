"""FSDP2 on two CPU processes: sharded equals whole, across reductions."""

import ddp_runs
import fsdp_runs
import pytest
import torch
from runs import on_two_processes
from safetensors.torch import load_file
from tiny import batch

from hf_compressm import CompressionConfig
from hf_compressm.training import reduce_checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, repo_env):
    """What the runs left, and where."""
    directory = on_two_processes(fsdp_runs.__file__, tmp_path_factory.mktemp("fsdp"), repo_env)
    return torch.load(directory / "found.pt"), directory


def logits(architecture, weights):
    model = ddp_runs.make_model(architecture)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(batch(4, 32)["input_ids"]).logits


@pytest.mark.parametrize(("architecture", "optim"), [(name, optim) for name, (_, optim) in fsdp_runs.LOOPS.items()])
def test_sharded_equals_one_process(sharded, architecture, optim):
    found, expected = sharded[0][architecture], fsdp_runs.loop(architecture, ranks=1)
    assert found["config"] == expected["config"]
    assert found["config"]["state_size"] < ddp_runs.make_model(architecture).config.state_size
    ours, theirs = (logits(architecture, run["weights"]) for run in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if optim == "sgd" else 1e-4)
    for name, state in expected["state"].items():
        for key, value in state.items():
            assert found["state"][name][key].shape == value.shape
            # whose phase is free in the states of a MIMO SSM
            torch.testing.assert_close(found["state"][name][key].norm(), value.norm(), rtol=1e-3, atol=1e-5)


def test_a_sharded_run_of_the_trainer_resumes_bit_for_bit(sharded):
    _, directory = sharded
    for name in ("model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"):
        load = load_file if name.endswith("safetensors") else torch.load
        straight, resumed = (load(directory / run / "checkpoint-15" / name) for run in ("straight", "resumed"))
        if name == "optimizer.bin":
            straight, resumed = (
                {(n, k): t for n, state in saved["state"].items() for k, t in state.items()}
                for saved in (straight, resumed)
            )
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


def test_a_whole_checkpoint_of_a_sharded_run_is_reduced_on_disk_with_its_moments(sharded, tmp_path):
    source = sharded[1] / "straight" / "checkpoint-6"
    report = reduce_checkpoint(source, tmp_path / "checkpoint-6", CompressionConfig(tolerance=0.3))
    assert [event.step for event in report.events] == [4, 6]
    size = report.events[-1].layers[0].after
    name = "model.layers.0.mixer.B_re"
    assert torch.load(tmp_path / "checkpoint-6" / "pytorch_model_fsdp.bin")[name].shape[0] == size
    assert torch.load(tmp_path / "checkpoint-6" / "optimizer.bin")["state"][name]["exp_avg"].shape[0] == size


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "rollback": "`rollback_metric`",
        "loss": "`max_loss_increase` and `rollback_metric`",
        "new parameters": 'method="selection"',
        "hybrid": "hybrid sharding",
        "tensor parallel": "tensor parallel",
        "full size": "`from_pretrained`",
        "shards": "FULL_STATE_DICT",
        "analysis": "`hf-compressm analyze` on a checkpoint",
        "dry run": "`hf-compressm analyze` on a checkpoint",
    }.items(),
)
def test_what_sharding_has_no_place_for_is_refused(sharded, name, message):
    assert message in sharded[0][name]
