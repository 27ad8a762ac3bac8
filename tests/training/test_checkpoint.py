"""Checkpoints: whole, incomplete, damaged, of another run."""

import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from ddp_runs import make_model
from runs import assert_equal_bit_for_bit, make_trainer, trainer_state
from tiny import Windows, state_sizes, tiny_lm
from transformers import Trainer, TrainerCallback

from hf_compressm import CompressionReport, CompreSSMCallback
from hf_compressm.training.checkpoint import find_damage, last_whole_checkpoint

# the Trainer's mean loss since the last log does not survive a resume, so that each step is logged
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
LOSS = {"max_loss_increase": 0.02, "start": 3, "end": 6, "num_reductions": 1}  # calibrates in steps 3 to 6


def small(**options):
    return tiny_lm(**{"state_size": 16, "hidden_size": 8, **options})


def run(path, rule=LOSS, resume=None, **options):
    options = {"max_steps": 10, **EVERY_STEP, **options}
    trainer = make_trainer(path, small(), [CompreSSMCallback(**rule)], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run with a checkpoint for every step."""
    path = tmp_path_factory.mktemp("straight")
    return run(path), path


def copy_of(straight, tmp_path, until):
    """The output directory of the run as it was after a step."""
    _, path = straight
    for step in range(1, until + 1):
        shutil.copytree(path / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def cut(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])


DAMAGE = {
    "no state": lambda c: (c / "trainer_state.json").unlink(),
    "half a state": lambda c: cut(c / "trainer_state.json"),
    "another kind of state": lambda c: (c / "trainer_state.json").write_text("[]"),
    "half the weights": lambda c: cut(c / "model.safetensors"),
    "half the moments": lambda c: cut(c / "optimizer.pt"),
    "half the random numbers": lambda c: cut(c / "rng_state.pth"),
    "half the sums": lambda c: cut(c / "compressm_calibration_0.safetensors"),
    "no sums": lambda c: (c / "compressm_calibration_0.safetensors").unlink(),
    "nothing": lambda c: [file.unlink() for file in c.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_checkpoint_is_stepped_over(straight, tmp_path, caplog, damage):
    output = copy_of(straight, tmp_path, until=5)
    for step in (4, 5):
        DAMAGE[damage](output / f"checkpoint-{step}")
    if damage == "half a state":  # one of them in the Trainer is enough
        resumed = run(output, resume=True)
        assert_equal_bit_for_bit(resumed, straight[0])
        assert trainer_state(output / "checkpoint-10") == trainer_state(straight[1] / "checkpoint-10")
        assert find_damage(output / "checkpoint-5") == ""  # written again on the way
    else:
        assert last_whole_checkpoint(output) == output / "checkpoint-3"
    assert "Stepping over checkpoint-5, which is incomplete" in caplog.text
    assert "Resuming from" in caplog.text


def test_a_named_checkpoint_has_to_be_whole(straight, tmp_path):
    output = copy_of(straight, tmp_path, until=2)
    cut(output / "checkpoint-2" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 cannot be resumed from: model.safetensors is damaged.*checkpoint-1"
    ):
        run(output, resume=str(output / "checkpoint-2"))
    DAMAGE["no state"](output / "checkpoint-1")
    with pytest.raises(ValueError, match=r"found checkpoint-2: .*; checkpoint-1: .*Start afresh"):
        run(output, resume=True)
    with pytest.raises(ValueError, match="there is no such directory"):
        run(output, resume=str(output / "checkpoint-3"))
    with pytest.raises(ValueError, match="found none"):
        run(tmp_path / "empty", resume=True)


def test_files_of_the_user_do_not_matter(straight, tmp_path):
    checkpoint = shutil.copytree(straight[1] / "checkpoint-7", tmp_path / "checkpoint-7")
    for name in ("notes.bin", "tokens.pt", "empty.json"):
        (checkpoint / name).write_bytes(b"")
    (checkpoint / "pictures").mkdir()
    assert find_damage(checkpoint) == ""


def test_all_checkpoints_of_a_run_are_whole(straight):
    for step in range(1, 11):
        assert find_damage(straight[1] / f"checkpoint-{step}") == ""
        sums = straight[1] / f"checkpoint-{step}" / "compressm_calibration_0.safetensors"
        assert sums.exists() == (step in (3, 4, 5))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    options = {"max_steps": 2, "save_only_model": True}
    run(tmp_path / "three", {"end": 1, "num_reductions": 1}, **options)
    checkpoint = str(tmp_path / "three" / "checkpoint-2")
    deeper = make_trainer(tmp_path / "a", small(layers=3), **options)
    with pytest.raises(ValueError, match=r"lacks model.layers.2.* Resume with the model of the original run"):
        deeper.train(resume_from_checkpoint=checkpoint)
    shallower = make_trainer(tmp_path / "b", small(layers=1), **options)
    with pytest.raises(ValueError, match=r"which has model.layers.1.* besides"):
        shallower.train(resume_from_checkpoint=checkpoint)
    assert deeper.state.global_step == shallower.state.global_step == 0


def test_a_checkpoint_of_another_schedule_is_announced(straight, tmp_path, caplog):
    rule = {"tolerance": 0.3, "start": 3, "end": 9, "num_reductions": 2}
    run(tmp_path, rule, resume=str(straight[1] / "checkpoint-7"), max_steps=12)
    assert "max_loss_increase=0.02 then, None now" in caplog.text
    assert "max_steps=10 then, 12 now" in caplog.text
    assert "taken place after step 6; from here on they take place after step 9" in caplog.text
    assert [event.step for event in CompressionReport.load(tmp_path).events] == [6, 9]


def test_the_same_options_are_no_news(straight, tmp_path, caplog):
    run(tmp_path, resume=str(straight[1] / "checkpoint-7"))
    assert "other options" not in caplog.text


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


OPTIONS = {
    "shards": {"max_shard_size": "10KB"},
    "restored callbacks and a limit": {"restore_callback_states_from_checkpoint": True, "save_total_limit": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_the_uninterrupted_one_with(straight, tmp_path, monkeypatch, name):
    options = dict(OPTIONS[name])
    if size := options.pop("max_shard_size", None):
        save = type(straight[0].model).save_pretrained
        sharded = lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": size})  # noqa: E731
        monkeypatch.setattr(type(straight[0].model), "save_pretrained", sharded)
    for step in (4, 7) if name == "shards" else (4,):  # before the reduction, in its window, and after it
        output = tmp_path / str(step)
        callbacks = [CompreSSMCallback(**LOSS), Stop(step)]
        make_trainer(output, small(), callbacks, max_steps=10, **EVERY_STEP, **options).train()
        if name == "shards":
            assert len(list((output / f"checkpoint-{step}").glob("model-*.safetensors"))) > 1
        if "save_total_limit" in options:
            assert len(list(output.glob("checkpoint-*"))) == 1
        assert_equal_bit_for_bit(run(output, resume=True, **options), straight[0])


def test_a_resumed_run_makes_its_model_anew(tmp_path):
    def go(path, *callbacks, resume=None):
        args = make_trainer(path, small(), **{"max_steps": 10, **EVERY_STEP}).args
        callbacks = [CompreSSMCallback(**LOSS), *callbacks]
        trainer = Trainer(model_init=lambda: small(), args=args, train_dataset=Windows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    uninterrupted = go(tmp_path / "straight")
    go(tmp_path / "run", Stop(7))
    assert_equal_bit_for_bit(go(tmp_path / "run", resume=True), uninterrupted)


def test_weights_alone_can_be_resumed_from(tmp_path):
    rule = {"tolerance": 0.1, "start": 2, "end": 4, "num_reductions": 1}
    first = run(tmp_path, rule, max_steps=6, save_only_model=True)
    resumed = run(tmp_path, rule, resume=True, max_steps=8, save_only_model=True)
    assert resumed.state.global_step == 8
    assert state_sizes(resumed.model) == state_sizes(first.model)
    assert max(state_sizes(resumed.model)) < 16


def test_sums_are_those_of_the_checkpoint_that_is_named(straight, tmp_path):
    """The output directory may hold a checkpoint of the same step of another run."""
    shutil.copytree(straight[1] / "checkpoint-3", tmp_path / "checkpoint-5")
    shutil.copytree(straight[1] / "checkpoint-5", tmp_path / "elsewhere" / "checkpoint-5")
    assert_equal_bit_for_bit(run(tmp_path, resume=str(tmp_path / "elsewhere" / "checkpoint-5")), straight[0])


def test_what_was_replaced_on_the_trainer_is_put_back(straight):
    assert not {"save_model", "compute_loss"} & vars(straight[0]).keys()


# Kills: each run is a process of its own, forked so that nothing has to be imported again.

POINTS = {
    "in the window": ("step", 4),
    "in the reduction": ("reduce", 6),
    "at its end": ("reduced", 6),
    "while the weights are saved": ("save", 5),
    "before the state is saved": ("state", 7),
}


def interrupted(path: Path, where: str, step: int) -> None:
    """The run of `straight`, which kills its own process at a point that no handler sees."""
    from hf_compressm import compression
    from hf_compressm.training import callback

    def kill_at(name):
        if name == where and trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    class Step(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kill_at("step")

    trainer = make_trainer(path, small(), [CompreSSMCallback(**LOSS), Step()], max_steps=10, **EVERY_STEP)
    carry_state, compress_once = compression.carry_state, callback.compress_once
    compression.carry_state = lambda *args: [carry_state(*args), kill_at("reduce")]
    callback.compress_once = lambda *args: [compress_once(*args), kill_at("reduced")][0]
    save_model, save_rng_state = trainer.save_model, trainer._save_rng_state

    def save(output_dir=None, **options):
        save_model(output_dir, **options)
        if where == "save" and trainer.state.global_step == step:
            cut(Path(output_dir) / "model.safetensors")
        kill_at("save")

    trainer.save_model = save
    trainer._save_rng_state = lambda output_dir: [save_rng_state(output_dir), kill_at("state")]
    trainer.train()


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_bit_for_bit(straight, tmp_path, point):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of pytest, which the child does not need
        child = os.fork()
    if child == 0:
        try:
            interrupted(tmp_path, *POINTS[point])
        finally:
            os._exit(1)  # not reached
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended[0] == child
    assert os.WIFSIGNALED(ended[1])
    assert os.WTERMSIG(ended[1]) == signal.SIGKILL
    resumed = run(tmp_path, resume=True)
    assert_equal_bit_for_bit(resumed, straight[0])
    for step in range(1, 11):
        one, other = straight[1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}"
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
        assert trainer_state(one) == trainer_state(other)
        for name in ("model.safetensors", "compressm_calibration_0.safetensors"):
            assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes()
        numbers = [torch.load(c / "rng_state.pth", weights_only=False)["cpu"] for c in (one, other)]
        assert torch.equal(*numbers)


class Blockwise(torch.optim.Optimizer):
    """Scales steps by a state of another shape than the parameter, as optimizers that quantize or project do."""

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                scale = self.state[param].setdefault("absmax", torch.ones(3))
                scale.mul_(0.9).add_(param.grad.abs().max(), alpha=0.1)
                param.sub_(param.grad, alpha=0.1 / scale.sum().item())


@pytest.mark.parametrize("kind", ["mimo_ssm", "reducible_mamba2"])
def test_state_with_shapes_of_its_own_is_resumed_bit_for_bit(tmp_path, kind):
    def go(path, resume=None):
        model = small() if kind == "mimo_ssm" else make_model(kind)
        optimizers = (Blockwise(model.parameters(), {"lr": 0.1}), None)
        callback = CompreSSMCallback(target_state_size=4, start=2, end=4, num_reductions=1, moments="reset")
        options = {"max_steps": 8, **EVERY_STEP, "optimizers": optimizers}
        trainer = make_trainer(path, model, [callback], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = go(tmp_path / "straight")
    assert CompressionReport.load(tmp_path / "straight").events[0].changed
    for step in (3, 6):
        assert_equal_bit_for_bit(go(tmp_path / "resumed", str(tmp_path / "straight" / f"checkpoint-{step}")), straight)
