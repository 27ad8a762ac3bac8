"""Second thoughts: a reduction that an evaluation finds too dear is taken back."""

import errno
import os
import resource

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from runs import assert_equal_bit_for_bit, make_trainer, trainer_state
from tiny import Windows, batch, state_sizes, tiny_lm, train
from torch import nn
from transformers import TrainerCallback

from hf_compressm import (
    CompressionReport,
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    compress,
)
from hf_compressm.training.rollback import Rollback
from hf_compressm.training.snapshot import FOLDER, Snapshot, SnapshotStore

DEAR = {"target_state_size": 1, "num_reductions": 1, "rollback_metric": "loss", "rollback_tolerance": 0.0}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 5, "learning_rate": 1e-2}


def run(path, rule, resume=None, model=None, **options):
    callback = CompreSSMCallback(**rule)
    trainer = make_trainer(path, model, [callback], **{**EVALUATE, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Worsens(TrainerCallback):
    """Makes the model worse from a step on, so that any reduction just before is blamed."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(-5)


def test_a_reduction_taken_back_at_once_has_never_happened(tmp_path):
    """The evaluation at the step of the reduction judges it, and from there on the run is one without a callback."""
    plain = make_trainer(tmp_path / "plain", callbacks=[Worsens(15)], **EVALUATE)
    plain.train()
    callbacks = [Worsens(15), CompreSSMCallback(**DEAR, start=5, end=15)]
    trainer = make_trainer(tmp_path / "run", callbacks=callbacks, **EVALUATE)
    params = {id(param) for param in trainer.model.parameters()}
    trainer.train()
    assert {id(param) for param in trainer.model.parameters()} == params
    assert_equal_bit_for_bit(trainer, plain)
    assert state_sizes(trainer.model) == [32, 32]

    (event,) = CompressionReport.load(tmp_path / "run").events
    assert event.rolled_back_at == 15
    assert event.metric_after > event.metric_before
    assert "was taken back at step 15" in str(CompressionReport.load(tmp_path / "run"))
    entries = {k: v for entry in trainer.state.log_history if entry["step"] == 15 for k, v in entry.items()}
    assert entries["compressm/rolled_back_to"] == 15
    assert entries["compressm/total_state_size"] == 64
    assert not (tmp_path / "run" / FOLDER).exists()


def test_the_training_since_the_reduction_is_lost_and_the_schedule_goes_on(tmp_path):
    class Record(TrainerCallback):
        seen = {}

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.note("step", state, model, optimizer)

        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.note("begin", state, model, optimizer)

        def note(self, when, state, model, optimizer):
            moments = [s["exp_avg"].clone() for p in model.parameters() if (s := optimizer.state.get(p))]
            weights = [value.clone() for value in model.state_dict().values()]
            self.seen[when, state.global_step] = weights + moments

    record = Record()
    callbacks = [record, Worsens(8), CompreSSMCallback(**DEAR, start=5, end=7)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **EVALUATE)
    trainer.train()
    before, after = record.seen["step", 7], record.seen["begin", 10]
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.state.global_step == 20
    assert CompressionReport.load(tmp_path).events[0].rolled_back_at == 10


def test_a_reduction_that_costs_little_stays(tmp_path):
    rule = {"reduction_fraction": 0.1, "start": 5, "end": 15, "num_reductions": 3, "rollback_metric": "eval_loss"}
    trainer = run(tmp_path, rule, eval_steps=2)
    events = CompressionReport.load(tmp_path).events
    assert [event.step for event in events] == [8, 12, 15]
    assert all(event.rolled_back_at is None and event.metric_after < event.metric_before for event in events)
    assert state_sizes(trainer.model) == [layer.after for layer in events[-1].layers]
    assert max(state_sizes(trainer.model)) < 28
    assert not (tmp_path / FOLDER).exists()


def test_a_tenth_at_a_time_until_the_text_is_predicted_worse(tmp_path):
    """The pragmatic variant of the paper, judged by the loss on text when the learning rate is nearly spent."""
    rule = {"reduction_fraction": 0.1, "start": 98, "end": 118, "num_reductions": 20}
    rule |= {"rollback_metric": "loss", "rollback_tolerance": 5e-4}
    model = tiny_lm(state_size=32, hidden_size=8)
    trainer = run(tmp_path, rule, model=model, max_steps=120, eval_steps=1, eval_delay=97)
    events = [event for event in CompressionReport.load(tmp_path).events if event.changed]
    *kept, last = events
    assert len(kept) > 5
    assert all(event.rolled_back_at is None for event in kept)
    assert all(event.metric_after <= event.metric_before * (1 + 5e-4) for event in kept)
    assert last.rolled_back_at == last.step
    assert last.metric_after > last.metric_before * (1 + 5e-4)
    assert state_sizes(trainer.model) == [layer.after for layer in kept[-1].layers]


def test_after_going_back_nothing_more_is_reduced(tmp_path, caplog):
    rule = {"reduction_fraction": 0.3, "start": 5, "end": 17, "num_reductions": 3, "rollback_metric": "loss"}
    callbacks = [Worsens(14), CompreSSMCallback(**rule)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **EVALUATE)
    trainer.train()
    events = CompressionReport.load(tmp_path).events
    assert [(event.step, event.rolled_back_at) for event in events] == [(9, None), (13, 15)]
    assert state_sizes(trainer.model) == [layer.after for layer in events[0].layers]
    assert trainer.model.config.state_size == max(state_sizes(trainer.model))
    assert "back to the model before the reduction at step 13" in caplog.text


def test_reductions_between_two_evaluations_are_taken_back_together(tmp_path):
    rule = {"reduction_fraction": 0.3, "start": 4, "end": 8, "num_reductions": 2, "rollback_metric": "loss"}
    trainer = make_trainer(tmp_path, callbacks=[Worsens(9), CompreSSMCallback(**rule)], **EVALUATE)
    trainer.train()
    events = CompressionReport.load(tmp_path).events
    assert [(event.step, event.rolled_back_at) for event in events] == [(6, 10), (8, 10)]
    assert state_sizes(trainer.model) == [32, 32]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_decides_as_the_uninterrupted_one(tmp_path, restore):
    """From before the reduction, from between it and the evaluation, and from after going back; into another
    directory."""

    def go(path, resume=None):
        options = {"save_strategy": "steps", "save_steps": 1, "eval_on_start": True}
        callbacks = [Worsens(8), CompreSSMCallback(**DEAR, start=5, end=7)]
        options["restore_callback_states_from_checkpoint"] = restore
        trainer = make_trainer(path, callbacks=callbacks, max_steps=12, **EVALUATE, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = go(tmp_path / "straight")
    assert [e.rolled_back_at for e in CompressionReport.load(tmp_path / "straight").events] == [10]
    moved = (tmp_path / "straight").rename(tmp_path / "moved")
    for step in (8, 10) if restore else (6, 7, 9, 11):
        resumed = go(tmp_path / f"from-{step}", str(moved / f"checkpoint-{step}"))
        assert_equal_bit_for_bit(resumed, straight)
        last = [trainer_state(tmp_path / name / "checkpoint-12") for name in ("moved", f"from-{step}")]
        for state in last:  # eval_on_start of the resumed run is one more entry
            state["log_history"] = [e for e in state["log_history"] if e["step"] == 12]
        assert last[0] == last[1]


def test_without_its_snapshot_a_resumed_run_keeps_the_reduction_and_says_so(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1}
    rule = {**DEAR, "start": 5, "end": 7}
    run(tmp_path / "straight", rule, max_steps=9, **options)
    (snapshot,) = (tmp_path / "straight" / FOLDER).iterdir()  # kept for the checkpoints that wait for the decision
    data = bytearray(snapshot.read_bytes())
    data[-3] ^= 1
    snapshot.write_bytes(data)
    damaged = run(tmp_path / "damaged", rule, str(tmp_path / "straight" / "checkpoint-8"), max_steps=12)
    assert "is damaged or of another run" in caplog.text
    snapshot.unlink()
    gone = run(tmp_path / "gone", rule, str(tmp_path / "straight" / "checkpoint-8"), max_steps=12)
    assert "The reduction at step 7 stays, whatever the next evaluation says" in caplog.text
    assert state_sizes(damaged.model) == state_sizes(gone.model) == [1, 1]
    renamed = rule | {"rollback_metric": "perplexity"}
    with pytest.raises(KeyError, match="Expected 'eval_perplexity'"):
        run(tmp_path / "another", renamed, str(tmp_path / "straight" / "checkpoint-8"))
    assert "nothing to go back to: its evaluations have no eval_perplexity" in caplog.text


def test_the_best_model_is_that_of_the_sizes_gone_back_to(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    callbacks = [Worsens(6), CompreSSMCallback(**DEAR, start=5, end=7)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **EVALUATE, **best)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    # the loss at step 10 is that of the reduced model; the checkpoint holds the one gone back to
    assert trainer.state.best_global_step == 5
    assert trainer.state.best_metric == losses[5] < losses[10]
    assert state_sizes(trainer.model) == [32, 32]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[5])


@pytest.fixture
def limit():
    """The operating system refuses to write more than some bytes to a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("cause", ["disk full", "not a folder"])
def test_where_no_snapshot_can_be_written_nothing_is_reduced(tmp_path, caplog, limit, cause):
    class Full(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if cause == "disk full" and state.global_step == 6:
                limit(4096)

        def on_step_begin(self, args, state, control, **kwargs):
            limit(resource.RLIM_INFINITY)

    if cause == "not a folder":
        (tmp_path / FOLDER).write_text("something else")
    callbacks = [Full(), CompreSSMCallback(**DEAR, start=5, end=7)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=12, **EVALUATE)
    trainer.train()
    assert state_sizes(trainer.model) == [32, 32]
    assert "keeps its 32 states: the snapshot to go back to could not be written" in caplog.text
    assert trainer.state.global_step == 12
    (event,) = CompressionReport.load(tmp_path).events
    assert not event.changed
    if cause == "disk full":
        assert os.strerror(errno.EFBIG) in caplog.text
        assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, "found eval_strategy='no'"),
        ({"eval_steps": 8}, "which takes place after step 7; found the first evaluation after step 8"),
        ({"eval_steps": 7}, "Set eval_on_start=True"),
        ({"eval_delay": 9}, "found the first evaluation after step 10"),
        ({"eval_strategy": "epoch"}, "found the first evaluation after step 64"),
    ],
)
def test_a_run_that_could_not_judge_is_refused_before_the_first_step(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, {**DEAR, "start": 5, "end": 7}, **options)


def test_epochs_are_counted(tmp_path):
    options = {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 64}
    callbacks = [Worsens(7), CompreSSMCallback(**DEAR, start=4, end=6)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **EVALUATE | options)
    trainer.train()
    assert [e.rolled_back_at for e in CompressionReport.load(tmp_path).events] == [8]
    assert trainer.state.global_step == 12


def test_one_of_several_evaluation_sets_decides(tmp_path):
    callbacks = [Worsens(8), CompreSSMCallback(**DEAR | {"rollback_metric": "second_loss"}, start=5, end=7)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=12, **EVALUATE)
    trainer.eval_dataset = {"first": Windows(count=4), "second": Windows(count=8)}
    trainer.train()
    (event,) = CompressionReport.load(tmp_path).events
    losses = {e["step"]: e["eval_second_loss"] for e in trainer.state.log_history if "eval_second_loss" in e}
    assert (event.metric_before, event.metric_after, event.rolled_back_at) == (losses[5], losses[10], 10)


def test_a_metric_that_is_not_reported_is_refused_at_the_first_evaluation(tmp_path):
    with pytest.raises(KeyError, match=r"Expected 'eval_accuracy'.*found eval_loss"):
        run(tmp_path, {**DEAR, "rollback_metric": "accuracy", "start": 5, "end": 7})


def test_a_metric_that_is_to_be_large(tmp_path):
    callback = CompreSSMCallback(**{**DEAR, "rollback_metric": "accuracy", "start": 5, "end": 7})
    trainer = make_trainer(tmp_path, callbacks=[callback], **EVALUATE)
    values = iter([0.5, 0.6, 0.7, 0.8])
    trainer.compute_metrics = lambda prediction: {"accuracy": next(values)}
    trainer.train()
    (event,) = CompressionReport.load(tmp_path).events
    assert (event.metric_before, event.metric_after, event.rolled_back_at) == (0.5, 0.6, None)


def test_snapshots_are_never_pushed(tmp_path, monkeypatch):
    pushed = []

    class Api:
        def upload_folder(self, folder_path, ignore_patterns=None, **options):
            files = [str(p.relative_to(folder_path)) for p in tmp_path.rglob("*") if p.is_file()]
            assert any(FOLDER in file for file in files)
            pushed.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    trainer = make_trainer(tmp_path)
    SnapshotStore(tmp_path).write(7, Snapshot.take(trainer.model, None))
    trainer.hub_model_id = "someone/something"
    monkeypatch.setattr(trainer, "create_model_card", lambda **options: None)
    trainer.push_to_hub()
    assert "model.safetensors" in pushed
    assert not [file for file in pushed if FOLDER in file]


class Stateful(torch.optim.SGD):
    """Keeps more than tensors, as some optimizers of other packages do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["history"] = [1.0, 2.0]


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=3e-3, amsgrad=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=3e-3, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "plain sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.02),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.5),
}


def mamba2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 16}
    return ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))


@pytest.mark.parametrize("make_model", [tiny_lm, mamba2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_back_and_training_on_equals_never_having_reduced(tmp_path, name, make_model):
    results = []
    for reduced in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        train(model, optimizer)
        groups = [[id(param) for param in group["params"]] for group in optimizer.param_groups]
        if reduced:
            store = SnapshotStore(tmp_path)
            digest = store.write(5, Snapshot.take(model, optimizer))
            compress(model, target_state_size=4, optimizer=optimizer, dataloader=[batch()])
            train(model, optimizer, steps=2)
            store.read(5, digest).put_back(model, optimizer)
            assert groups == [[id(param) for param in group["params"]] for group in optimizer.param_groups]
        train(model, optimizer, steps=3)
        results.append((model, optimizer))
    (one, first), (other, second) = results
    assert one.config.to_dict() == other.config.to_dict()
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    for index, state in first.state_dict()["state"].items():
        for key, value in state.items():
            again = second.state_dict()["state"][index][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again)), key


class ScheduleFree(torch.optim.SGD):
    """Keeps scalars in its groups, as Prodigy and the schedule-free optimizers do, and evaluates averaged weights."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {
                "k": 0,
                "d": 1.0,
                "weight_sum": torch.zeros(()),
                "train_mode": True,
                "init": torch.nn.init.zeros_,
            }

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            weight = group["lr"] * group["d"]
            group["k"] += 1
            group["d"] *= 0.9
            group["weight_sum"] += weight
            for param in group["params"]:
                if param.grad is not None:
                    average = self.state[param].setdefault("average", param.clone())
                    param.sub_(param.grad, alpha=weight)
                    average.lerp_(param, (weight / group["weight_sum"]).item())

    @torch.no_grad()
    def _exchange(self, train_mode):
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                group["train_mode"] = train_mode
                for param in group["params"]:
                    if "average" in self.state[param]:
                        kept = self.state[param]["average"].clone()
                        self.state[param]["average"].copy_(param)
                        param.copy_(kept)

    def train(self):
        self._exchange(True)

    def eval(self):
        self._exchange(False)


def test_scalars_of_the_optimizers_groups_go_back_and_what_is_scheduled_goes_on(tmp_path):
    """In a run: averaged weights are evaluated, taken back at step 10 to step 7, and trained on."""
    seen = {}

    class Record(TrainerCallback):
        def note(self, when, state, model, optimizer):
            group = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.param_groups[0].items()}
            seen[when, state.global_step] = group, [p.detach().clone() for p in model.parameters()]

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * state.global_step  # a schedule of the user's
            self.note("end", state, model, optimizer)

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.note("next", state, model, optimizer)

    model = tiny_lm()
    optimizer = ScheduleFree(model.parameters())
    optimizers = (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12))
    callbacks = [Record(), Worsens(8), CompreSSMCallback(**DEAR, start=5, end=7, moments="reset")]
    trainer = make_trainer(tmp_path, model, callbacks, optimizers, max_steps=12, **EVALUATE)
    trainer.train()
    assert CompressionReport.load(tmp_path).events[0].rolled_back_at == 10
    (before, weights), (after, again) = seen["end", 7], seen["next", 10]
    assert [after[key] for key in ("k", "d", "train_mode")] == [7, pytest.approx(0.9**7), True]
    assert torch.equal(after["weight_sum"], before["weight_sum"])
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert after["lr"] == seen["end", 10][0]["lr"] < before["lr"]
    assert after["initial_lr"] == 0.1
    assert after["weight_decay"] == pytest.approx(1.0)
    assert seen["end", 12][0]["k"] == 9
    assert seen["end", 12][0]["init"] is torch.nn.init.zeros_


def test_a_run_that_ends_with_going_back_ends_with_the_weights_to_be_saved(tmp_path):
    seen = {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen[state.global_step] = [optimizer.state[p]["average"].clone() for p in model.parameters()]

    model = tiny_lm()
    optimizer = ScheduleFree(model.parameters())
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    callbacks = [Record(), Worsens(8), CompreSSMCallback(**DEAR, start=5, end=7, moments="reset")]
    trainer = make_trainer(tmp_path, model, callbacks, optimizers, max_steps=10, **EVALUATE)
    trainer.train()
    assert CompressionReport.load(tmp_path).events[0].rolled_back_at == 10
    assert not optimizer.param_groups[0]["train_mode"]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), seen[7], strict=True))


def test_a_schedule_of_betas_goes_on(tmp_path):
    model = tiny_lm()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12)
    found = {}

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found["end", state.global_step] = optimizer.param_groups[0]["betas"]

        def on_step_begin(self, args, state, control, **kwargs):
            found["begin", state.global_step] = optimizer.param_groups[0]["betas"]

    callbacks = [Record(), Worsens(8), CompreSSMCallback(**DEAR, start=5, end=7)]
    trainer = make_trainer(tmp_path, model, callbacks, (optimizer, schedule), max_steps=12, **EVALUATE)
    trainer.train()
    assert CompressionReport.load(tmp_path).events[0].rolled_back_at == 10
    assert found["begin", 10] == found["end", 10] != found["end", 7]


def test_the_entries_of_groups_keep_their_types(tmp_path):
    model, count = tiny_lm(), torch.tensor(3)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=torch.tensor(1e-3), foreach=False)
    for group in optimizer.param_groups:
        group["count"] = count  # one object, as groups have those of the optimizer's defaults
    kept = {"beta_powers": (0.5, 0.25), "d": np.float32(0.1), "k": np.int64(2), "scale": torch.tensor(2.0)}
    optimizer.param_groups[1] |= kept
    optimizer.param_groups[1]["scale"].requires_grad_()
    options = {"by_number": {1: 0.5}, "mixed": {1: 0.5, "a": 2}, "pairs": [(1, 2)]}  # JSON would change their keys
    optimizer.param_groups[1] |= options
    store = SnapshotStore(tmp_path)
    digest = store.write(1, Snapshot.take(model, optimizer))
    expected = [dict(group) for group in optimizer.state_dict()["param_groups"]]
    optimizer.param_groups[1] |= {"beta_powers": (0.25, 0.125), "d": np.float32(0.2), "k": np.int64(4)}
    with torch.no_grad():
        optimizer.param_groups[1]["scale"] += 1
    count += 4
    store.read(1, digest).put_back(model, optimizer)
    assert optimizer.state_dict()["param_groups"] == expected
    for name, value in (kept | options).items():
        assert type(optimizer.param_groups[1][name]) is type(value), name
    assert kept["scale"].item() == 2.0
    assert count == 3
    assert all(group["count"] is count for group in optimizer.param_groups)


def test_what_a_killed_write_leaves_is_cleared_away_and_nothing_else(tmp_path):
    store = SnapshotStore(tmp_path)
    for step in (1, 2):
        store.write(step, Snapshot.take(tiny_lm(), None))
    for name in (".tmpAbCdEf", "notes.txt"):
        (tmp_path / FOLDER / name).touch()
    store.keep_only({2})
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["notes.txt", "step-2.safetensors"]


def test_state_that_is_no_number_is_not_half_kept(tmp_path):
    model = tiny_lm()
    optimizer = Stateful(model.parameters(), lr=0.1)
    train(model, optimizer, steps=1)
    store = SnapshotStore(tmp_path)
    digest = store.write(1, Snapshot.take(model, optimizer))
    assert store.read(1, digest).values["optimizer/model.norm.weight/history"] == [1.0, 2.0]
    optimizer.state[model.model.norm.weight]["history"] = nn.Identity()
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.write(2, Snapshot.take(model, optimizer))
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-1.safetensors"]


def test_an_evaluation_after_the_run_judges_nothing(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    trainer = make_trainer(tmp_path, callbacks=[CompreSSMCallback(**DEAR, start=5, end=7), Stop()], **EVALUATE)
    trainer.train()
    assert "ended before an evaluation could judge the reduction at step 7" in caplog.text
    Worsens(8).on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.evaluate()
    assert state_sizes(trainer.model) == [1, 1]
    assert not (tmp_path / FOLDER).exists()


def test_checkpoints_are_looked_through_where_a_snapshot_may_have_become_useless(tmp_path, monkeypatch):
    """After a decision, after a checkpoint was saved and at the end, not at each of many evaluations."""
    cleaned = []
    monkeypatch.setattr(Rollback, "clean", lambda self: cleaned.append(trainer.state.global_step))
    callbacks = [CompreSSMCallback(**DEAR | {"rollback_tolerance": 9.0}, start=5, end=7)]
    options = EVALUATE | {"eval_steps": 1, "max_steps": 12, "save_strategy": "steps", "save_steps": 5}
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    trainer.train()
    assert cleaned == [5, 7, 10, 12, 12]


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action()


def test_evaluations_of_ones_own_judge_nothing_and_return_the_truth(tmp_path):
    """Within a run, before the Trainer's evaluation judges; and after a run that was interrupted."""
    other, seen = Windows(count=4), []

    def evaluate():
        seen.append((trainer.evaluate(other)["eval_loss"], state_sizes(trainer.model)))

    callbacks = [CompreSSMCallback(**DEAR, start=5, end=7), Worsens(8), At(8, evaluate), At(9, evaluate)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=12, **EVALUATE)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    (event,) = CompressionReport.load(tmp_path).events
    assert (event.metric_before, event.metric_after, event.rolled_back_at) == (losses[5], losses[10], 10)
    assert seen == [(losses[8], [1, 1]), (losses[9], [1, 1])]


@pytest.mark.parametrize(
    ("event", "first"), [("on_evaluate", True), ("on_evaluate", False), ("on_log", True), ("on_prediction_step", True)]
)
def test_evaluations_within_the_trainers_own_judge_nothing(tmp_path, event, first):
    """Of a callback before ours in the list, or after it, on data of its own."""

    class Evaluates(TrainerCallback):
        busy = False

    def evaluate(self, args, state, control, logs=None, **kwargs):
        if not self.busy and state.global_step in (5, 10) and (logs is None or "eval_loss" in logs):
            self.busy = True
            found[state.global_step] = trainer.evaluate(Windows(count=4))["eval_loss"]
            self.busy = False

    found = {}
    setattr(Evaluates, event, evaluate)
    ours = [CompreSSMCallback(**DEAR, start=5, end=7)]
    callbacks = [Evaluates(), *ours] if first else [*ours, Evaluates()]
    trainer = make_trainer(tmp_path, callbacks=[Worsens(8), *callbacks], max_steps=12, **EVALUATE)
    returned = []
    trainer._report_to_hp_search = lambda trial, step, metrics: returned.append(metrics["eval_loss"])
    trainer.train()
    (event,) = CompressionReport.load(tmp_path).events
    assert event.rolled_back_at == 10
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] in (5, 10)]
    assert event.metric_before not in found.values()
    assert event.metric_after not in found.values()
    assert {event.metric_before, event.metric_after} < set(losses)
    assert returned[:2] == [event.metric_before] * 2  # what the Trainer goes on with
    assert trainer.callback_handler.call_event.__self__ is trainer.callback_handler


@pytest.mark.parametrize("first", [True, False])
def test_the_trainers_own_evaluation_called_from_within_it_judges_nothing(tmp_path, first):
    """By a callback before ours in the list, or after it, on data of its own."""

    class Repeats(TrainerCallback):
        busy = False

        def on_evaluate(self, args, state, control, **kwargs):
            if not self.busy and state.global_step in (5, 10):
                own, trainer.eval_dataset, self.busy = trainer.eval_dataset, Windows(count=4), True
                trainer._evaluate(None, None)
                trainer.eval_dataset, self.busy = own, False

    ours = [CompreSSMCallback(**DEAR, start=5, end=7)]
    callbacks = [Repeats(), *ours] if first else [*ours, Repeats()]
    trainer = make_trainer(tmp_path, callbacks=[Worsens(8), *callbacks], max_steps=12, **EVALUATE)
    returned = []
    trainer._report_to_hp_search = lambda trial, step, metrics: returned.append(metrics["eval_loss"])
    trainer.train()
    (event,) = CompressionReport.load(tmp_path).events
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] == 10]
    at_5, judged_5, at_10, judged_10, _ = returned
    assert event.metric_before == judged_5 == judged_10 != at_5
    assert event.metric_after in losses
    assert event.metric_after != at_10


@pytest.mark.parametrize("restore", [False, True])
def test_an_interrupted_run_leaves_the_trainer_and_the_model_as_they_were_found(tmp_path, restore):
    def interrupt():
        raise KeyboardInterrupt

    def make(*others):
        rule = {"max_loss_increase": 0.5, "rollback_metric": "loss", "rollback_tolerance": 0.0}
        callbacks = [CompreSSMCallback(**rule, start=5, end=9, num_reductions=2), *others]
        options = {"save_strategy": "steps", "save_steps": 6, "restore_callback_states_from_checkpoint": restore}
        return make_trainer(tmp_path, callbacks=callbacks, max_steps=12, **EVALUATE, **options)

    make().train()
    trainer = make(Worsens(8), At(8, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert not {"save_model", "_evaluate", "compute_loss"} & vars(trainer).keys()
    sizes = state_sizes(trainer.model)
    assert max(sizes) < 32
    found = trainer.evaluate(Windows(count=4))["eval_loss"]
    assert state_sizes(trainer.model) == sizes
    with torch.no_grad():
        rows = torch.stack([row["input_ids"] for row in map(Windows(count=4).__getitem__, range(4))])
        assert found == pytest.approx(trainer.model.eval()(input_ids=rows, labels=rows).loss.item(), rel=1e-5)
