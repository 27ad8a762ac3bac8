"""The callback on the stock Trainer."""

import json
import logging
import shutil

import pytest
import torch
from runs import arguments, make_trainer
from tiny import Windows, state_sizes, tiny_lm
from torch import nn
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_compressm import CompressionReport, CompreSSMCallback, UnsupportedSetupError
from hf_compressm.report import REPORT_NAME


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_state_shrinks_at_the_scheduled_steps_and_everything_is_recorded(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=10)
    params = {id(p) for p in trainer.model.parameters()}
    trainer.train()
    assert {id(p) for p in trainer.model.parameters()} == params
    assert max(state_sizes(trainer.model)) < 32

    report = CompressionReport.load(tmp_path)
    assert [event.step for event in report.events] == [2, 4, 6, 8]
    assert [layer.after for layer in report.events[-1].layers] == state_sizes(trainer.model)
    assert (tmp_path / "checkpoint-10" / REPORT_NAME).exists()
    assert len(CompressionReport.load(tmp_path / "checkpoint-10").events) == 4

    entries = [entry for entry in trainer.state.log_history if "compressm/total_state_size" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8]
    assert entries[-1]["compressm/total_state_size"] == sum(state_sizes(trainer.model))
    assert entries[0]["compressm/seconds"] > 0

    trainer.save_model(tmp_path / "final")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert state_sizes(reloaded) == state_sizes(trainer.model)
    ids = Windows()[0]["input_ids"][None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, trainer.model(ids).logits)


def test_the_callback_without_arguments_reduces_in_the_first_tenth(tmp_path):
    model = tiny_lm(state_size=64, hidden_size=4)
    make_trainer(tmp_path, model=model, callbacks=[CompreSSMCallback()], max_steps=40).train()
    assert [event.step for event in CompressionReport.load(tmp_path).events] == [1, 2, 3, 4]
    assert max(state_sizes(model)) < 64


def test_logging_a_reduction_does_not_swallow_the_trainers_own_log(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=4, callbacks=[CompreSSMCallback(end=0.4)])
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("moments", ["carry", "reset"])
@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad", "muon", "adafactor-torch"]
)
def test_training_goes_on_with_every_optimizer(tmp_path, optim, moments):
    model = tiny_lm(state_size=32)
    optimizers = (None, None)
    options = {"optim": optim, "learning_rate": {"sgd": 0.3, "adagrad": 0.02}.get(optim, 3e-3)}
    if optim == "muon":
        for p in model.parameters():
            p.requires_grad = p.dim() == 2
        muon = torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)
        options, optimizers = {}, (muon, None)
    elif optim == "adafactor-torch":
        options, optimizers = {}, (torch.optim.Adafactor(model.parameters(), lr=0.02), None)
    callback = CompreSSMCallback(tolerance=0.1, end=0.4, moments=moments)
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback], optimizers=optimizers, max_steps=30, **options)
    trainer.train()
    assert max(state_sizes(model)) < 32
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses(trainer)[-1] < losses(trainer)[0]
    state = trainer.optimizer.optimizer.state
    for layer in model.model.layers:
        tensors = [t for t in state[layer.mixer.B_re].values() if torch.is_tensor(t) and t.dim()]
        assert all(t.shape[0] in (layer.mixer.state_size, 16, 1) for t in tensors)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    def run(path, resume=None):
        options = {"save_strategy": "steps", "save_steps": 5}
        trainer = make_trainer(path, callbacks=[CompreSSMCallback(tolerance=0.05, end=0.8)], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    for step in (5, 10):
        resumed = run(tmp_path / f"from-{step}", str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert state_sizes(resumed.model) == state_sizes(straight.model)
        for name, value in straight.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        a, b = (t.optimizer.state_dict()["state"] for t in (straight, resumed))
        assert a.keys() == b.keys()
        for index in a:
            assert all(torch.equal(torch.as_tensor(a[index][k]), torch.as_tensor(b[index][k])) for k in a[index])
        mine, other = (CompressionReport.load(tmp_path / run) for run in ("straight", f"from-{step}"))
        assert [[layer.after for layer in e.layers] for e in mine.events] == [
            [layer.after for layer in e.layers] for e in other.events
        ]


def test_a_checkpoint_written_without_the_callback_can_be_resumed_with_it(tmp_path):
    make_trainer(tmp_path / "plain", callbacks=[], save_strategy="steps", save_steps=5, max_steps=5).train()
    trainer = make_trainer(tmp_path / "with", save_strategy="steps", save_steps=10)
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-5"))
    assert [event.step for event in CompressionReport.load(tmp_path / "with").events] == [6, 8]


class WorseAndWorse(TrainerCallback):
    """Makes the first evaluation the best, whatever the model."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_made_up"] = state.global_step


def test_the_best_model_is_never_one_from_before_a_reduction(tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "made_up", "greater_is_better": False}
    callbacks = [WorseAndWorse(), CompreSSMCallback(tolerance=0.1, end=0.6, num_reductions=2)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options, **best)
    original = trainer.evaluate

    def evaluate(*args, **kwargs):
        metrics = original(*args, **kwargs)
        metrics["eval_made_up"] = trainer.state.global_step
        return metrics

    trainer.evaluate = evaluate
    trainer.train()
    report = CompressionReport.load(tmp_path)
    assert report.events[-1].step == 12
    assert trainer.state.best_global_step == 15  # the first evaluation after the last reduction
    assert state_sizes(trainer.model) == [layer.after for layer in report.events[-1].layers]


def test_early_stopping_starts_afresh_after_a_reduction(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": False}
    options |= {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    callbacks = [EarlyStoppingCallback(early_stopping_patience=3), CompreSSMCallback(tolerance=0.3, end=0.4)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    trainer.train()
    assert trainer.state.best_global_step > 8
    assert trainer.state.global_step == 20


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"torch_empty_cache_steps": 2, "weight_decay": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_training_goes_on_under(tmp_path, options):
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert max(state_sizes(trainer.model)) < 32
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_model_init_and_a_second_run_reduce_again_from_the_full_size(tmp_path):
    trainer = Trainer(
        model_init=lambda: tiny_lm(state_size=32),
        args=arguments(tmp_path),
        train_dataset=Windows(),
        callbacks=[CompreSSMCallback(tolerance=0.1, end=0.4)],
    )
    trainer.train()
    first = state_sizes(trainer.model)
    trainer.train()
    assert state_sizes(trainer.model) == first
    assert len(CompressionReport.load(tmp_path).events) == 4


def test_a_dry_run_reports_and_changes_nothing(tmp_path):
    results = []
    for callbacks in ([], [CompreSSMCallback(tolerance=0.1, end=0.4, dry_run=True)]):
        trainer = make_trainer(tmp_path / str(len(callbacks)), callbacks=callbacks)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    report = CompressionReport.load(tmp_path / "1")
    assert len(report.events) == 4
    assert report.events[0].layers[0].after < report.events[0].layers[0].before == 32


def test_a_target_is_reached_geometrically_and_exactly(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[CompreSSMCallback(target_state_size=8, end=0.4)])
    trainer.train()
    sizes = [event.layers[0].after for event in CompressionReport.load(tmp_path).events]
    assert sizes[-1] == 8
    for size, expected in zip(sizes, [32 * 0.25 ** (k / 4) for k in (1, 2, 3, 4)], strict=True):
        assert abs(size - expected) <= 1


def test_the_trainer_is_found_when_the_callback_is_added_later(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[])
    trainer.add_callback(CompreSSMCallback(tolerance=0.1, end=0.4))
    trainer.train()
    assert sum("compressm/seconds" in entry for entry in trainer.state.log_history) == 4


class NotReducible(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 4)

    def forward(self, input_ids, labels=None):
        return {"loss": self.embedding(input_ids).square().mean()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: make_trainer(path, model=NotReducible()), "NotReducible has no layer whose state can be"),
        (
            lambda path: make_trainer(path, callbacks=[CompreSSMCallback(target_state_size=33)]),
            "target_state_size=33 is above the present state size 32",
        ),
        (lambda path: make_trainer(path, callbacks=[CompreSSMCallback(end=30)]), "window ends at step 30"),
        (lambda path: make_trainer(path, callbacks=[CompreSSMCallback(start=10)]), "ends before it starts"),
        (
            lambda path: (
                lambda model: make_trainer(path, model, optimizers=(torch.optim.NAdam(model.parameters()), None))
            )(tiny_lm()),
            "NAdam cannot be carried",
        ),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, make, message):
    trainer = make(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "n_gpu", property(lambda self: 2))
    with pytest.raises(UnsupportedSetupError, match="torchrun"):
        CompreSSMCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_nan_loss_at_the_reduction_leaves_the_layers_alone(tmp_path, caplog):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.model.layers[0].mixer.C_re.fill_(torch.nan)

    logger = logging.getLogger("hf_compressm")
    logger.addHandler(caplog.handler)
    try:
        callbacks = [Poison(), CompreSSMCallback(tolerance=0.1, end=0.4)]
        trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=6)
        trainer.train()
    finally:
        logger.removeHandler(caplog.handler)
    assert state_sizes(trainer.model)[0] == 32
    assert trainer.state.global_step == 6
    assert "model.layers.0.mixer keeps its 32 states" in caplog.text


def test_the_best_checkpoint_may_have_other_sizes_than_the_last_and_training_can_go_on(tmp_path):
    """load_best_model_at_end with a best checkpoint from before the reduction, put there by hand."""
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    trainer = make_trainer(tmp_path, callbacks=[CompreSSMCallback(tolerance=0.1, start=6, end=10)], **options)

    class KeepFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 20:
                state.best_model_checkpoint = str(tmp_path / "checkpoint-5")
                args.load_best_model_at_end = True

    trainer.add_callback(KeepFirst())
    trainer.train()
    assert state_sizes(trainer.model) == [32, 32]
    assert trainer.model.config.state_size == 32
    for param, state in trainer.optimizer.optimizer.state.items():
        assert all(t.shape == param.shape for t in state.values() if torch.is_tensor(t) and t.dim())
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_state_of_the_callback_is_json_and_rebuilds_it(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=10)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())["stateful_callbacks"]
    again = CompreSSMCallback.from_state(saved["CompreSSMCallback"])
    assert again.config.tolerance == 0.1
    assert [event.step for event in again.report.events] == [2, 4, 6, 8]
    shutil.rmtree(tmp_path / "checkpoint-10")


def test_a_loss_limit_is_measured_as_the_trainer_computes_the_loss(tmp_path):
    seen = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        seen.append(torch.is_grad_enabled())
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    data = {"train_dataset": Windows(), "compute_loss_func": loss_of}
    callback = CompreSSMCallback(max_loss_increase=0.02, start=5, end=15, num_reductions=2, calibration_batches=3)
    args = arguments(tmp_path, max_steps=20, gradient_accumulation_steps=2)
    trainer = Trainer(model=tiny_lm(state_size=32), args=args, callbacks=[callback], **data)
    trainer.train()
    assert seen.count(True) == 2 * 20  # training
    assert seen.count(False) >= 3 * 4  # measured on three micro-batches, for several sizes
    assert max(state_sizes(trainer.model)) < 32
    assert "compute_loss" not in vars(trainer)


def test_a_loss_limit_works_with_label_smoothing_and_evaluation_in_between(tmp_path):
    callback = CompreSSMCallback(max_loss_increase=0.02, start=5, end=10, num_reductions=1)
    options = {"label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 8}
    trainer = make_trainer(tmp_path, callbacks=[callback], **options)
    trainer.train()
    assert max(state_sizes(trainer.model)) < 32


@pytest.mark.parametrize("step", [7, 8])
def test_a_run_resumed_inside_the_window_sees_the_same_batches(tmp_path, step):
    def run(path, resume=None):
        callback = CompreSSMCallback(max_loss_increase=0.01, start=5, end=10, num_reductions=1)
        options = {"save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(path, callbacks=[callback], max_steps=12, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    checkpoint = tmp_path / "straight" / f"checkpoint-{step}"
    assert (checkpoint / "compressm_calibration_0.safetensors").exists()
    assert not (tmp_path / "straight" / "checkpoint-11" / "compressm_calibration_0.safetensors").exists()
    resumed = run(tmp_path / "resumed", str(checkpoint))
    assert max(state_sizes(resumed.model)) < 32
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("rule", [{"tolerance": 0.1}, {"max_loss_increase": 0.05}], ids=lambda rule: next(iter(rule)))
def test_a_run_interrupted_inside_the_window_leaves_nothing_behind(tmp_path, rule):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.done:
                self.done = True
                raise KeyboardInterrupt

    interrupt = Interrupt()
    interrupt.done = False
    callback = CompreSSMCallback(**rule, start=2, end=5, num_reductions=1)
    trainer = make_trainer(tmp_path, callbacks=[callback, interrupt], max_steps=8)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert max(state_sizes(trainer.model)) < 32
    assert "compute_loss" not in vars(trainer)


def test_a_target_does_not_stand_in_the_way_of_a_resumed_run(tmp_path):
    """With a global budget some layers end below the target."""

    def run(path, resume=None):
        callback = CompreSSMCallback(target_state_size=8, budget="global", start=0, end=4, num_reductions=2)
        model = tiny_lm(state_size=32)
        with torch.no_grad():
            model.model.layers[0].mixer.C_re[:, 6:] *= 1e-3
            model.model.layers[0].mixer.C_im[:, 6:] *= 1e-3
        trainer = make_trainer(path, model, [callback], max_steps=6, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        return state_sizes(trainer.model)

    sizes = run(tmp_path / "straight")
    assert min(sizes) < 8 < max(sizes)
    for step in (2, 3, 5):
        assert run(tmp_path / f"from-{step}", str(tmp_path / "straight" / f"checkpoint-{step}")) == sizes


def test_one_callback_serves_several_trainers_in_turn(tmp_path):
    callback = CompreSSMCallback(max_loss_increase=0.05, end=0.4, num_reductions=1)
    first, second = (make_trainer(tmp_path / name, callbacks=[callback], max_steps=8) for name in ("a", "b"))
    for trainer in (first, second):
        trainer.train()
        assert max(state_sizes(trainer.model)) < 32
        assert sum("compressm/seconds" in entry for entry in trainer.state.log_history) == 1


def test_a_loss_that_cannot_be_seen_reduces_nothing_and_says_so(tmp_path, caplog):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    callback = CompreSSMCallback(max_loss_increase=0.05, end=0.4, num_reductions=1)
    trainer = Own(
        model=tiny_lm(), args=arguments(tmp_path, max_steps=6), train_dataset=Windows(), callbacks=[callback]
    )
    logger = logging.getLogger("hf_compressm")
    logger.addHandler(caplog.handler)
    try:
        trainer.train()
    finally:
        logger.removeHandler(caplog.handler)
    assert state_sizes(trainer.model) == [32, 32]
    assert "Does a subclass override `training_step`?" in caplog.text


def test_a_checkpoint_whose_moments_do_not_fit_is_refused(tmp_path):
    make_trainer(tmp_path / "straight", max_steps=10, save_strategy="steps", save_steps=5).train()
    checkpoint = tmp_path / "straight" / "checkpoint-5"
    saved = torch.load(checkpoint / "optimizer.pt")
    first, second = [i for i, s in saved["state"].items() if s["exp_avg"].dim() == 2][:2]
    saved["state"][first], saved["state"][second] = saved["state"][second], saved["state"][first]
    torch.save(saved, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="optimizer state of 2 parameters has other shapes"):
        make_trainer(tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))


def test_tensorboard_shows_sizes_energies_and_bounds(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    written = EventAccumulator(str(tmp_path / "logs")).Reload()
    report = CompressionReport.load(tmp_path)
    for name in ("total_state_size", "max_energy_discarded", "max_error_bound", "max_relative_error"):
        scalars = written.Scalars(f"train/compressm/{name}")
        expected = [event.summary()[f"compressm/{name}"] for event in report.events]
        assert [entry.step for entry in scalars] == [event.step for event in report.events]
        assert [entry.value for entry in scalars] == pytest.approx(expected)
    assert len(written.Scalars("train/compressm/state_size/model.layers.0.mixer")) == len(report.events)
