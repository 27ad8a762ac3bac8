"""Data parallel: two ranks equal one process, across reductions."""

import ddp_runs
import pytest
import torch
from runs import on_two_processes
from tiny import Windows

from hf_compressm.reducers import allow_other_sizes

ARCHITECTURES = {name: architecture for name, (architecture, *_) in ddp_runs.TRAINER_RUNS.items()}
LOOPS = dict.fromkeys(["fp16_hook", "power_hook"], "mimo_ssm") | {"unwrapped": "reducible_mamba"}
ROUNDED = {"bf16", "adamw"}  # where rounding errors are large, or divided by small gradients


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, repo_env):
    """What both ranks hold after each run; one launch for all of them."""
    output = on_two_processes(ddp_runs.__file__, tmp_path_factory.mktemp("two_ranks"), repo_env)
    return lambda name: [torch.load(output / f"{name}-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("name", "architecture"), (ARCHITECTURES | LOOPS).items())
def test_ranks_hold_equal_weights(two_ranks, name, architecture):
    first, second = two_ranks(name)
    assert first["config"] == second["config"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    full = ddp_runs.make_model(architecture).config.to_dict()
    assert (first["config"]["state_size"] < full["state_size"]) == (name != "kept")


def logits(architecture, weights):
    model = ddp_runs.make_model(architecture)
    allow_other_sizes(model)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(Windows()[0]["input_ids"][None]).logits


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ROUNDED])
def test_two_ranks_equal_one_process(two_ranks, tmp_path, name):
    one, (two, _) = ddp_runs.trainer_run(name, tmp_path), two_ranks(name)
    assert one.config.to_dict() == two["config"]
    found, expected = (logits(ARCHITECTURES[name], weights) for weights in (two["weights"], one.state_dict()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ranks_that_diverge_stop_the_run(two_ranks):
    for message in two_ranks("diverged"):
        assert "rank(s) [1] hold other weights than rank 0" in message


def test_processes_with_different_models_are_refused(two_ranks):
    for message in two_ranks("different"):
        assert "different weights (rank(s) [1] other than rank 0)" in message


def test_a_rank_that_does_not_take_part_is_named_and_may_come_later(two_ranks):
    first, second = two_ranks("absent")
    assert "rank(s) [1] did not within" in first
    assert second is None
