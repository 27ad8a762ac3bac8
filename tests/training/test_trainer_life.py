"""The rest of what the Trainer does with a run: schedulers, searches, loggers, averages, restarts."""

import optuna
import pytest
import torch
from runs import arguments, assert_equal_bit_for_bit, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Windows, state_sizes, tiny_lm
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback

from hf_compressm import (
    CompressionReport,
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    UnsupportedSetupError,
    compress,
)

RULE = {"tolerance": 0.1, "end": 4, "num_reductions": 1}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 8}
SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("scheduler", ["cosine_with_restarts", "greedy"])
def test_the_learning_rate_follows_its_schedule(tmp_path, scheduler):
    callbacks = [CompreSSMCallback(**RULE)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, lr_scheduler_type=scheduler, **EVALUATE, logging_steps=1)
    trainer.train()
    assert max(state_sizes(trainer.model)) < 32
    plain = make_trainer(tmp_path / "plain", callbacks=[], lr_scheduler_type=scheduler, **EVALUATE, logging_steps=1)
    plain.train()
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (trainer, plain)]
    assert rates[0] == rates[1]


def test_a_scheduler_on_plateaus_does_not_see_the_metric_of_a_model_taken_back(tmp_path, monkeypatch):
    class Worsens(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                with torch.no_grad():
                    model.lm_head.weight.mul_(-5)

    seen = []
    callbacks = [Worsens(), CompreSSMCallback(**RULE | {"end": 5}, rollback_metric="loss")]
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATE}
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    step = ReduceLROnPlateau.step
    monkeypatch.setattr(ReduceLROnPlateau, "step", lambda self, metric: [seen.append(metric), step(self, metric)])
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert [event.rolled_back_at for event in CompressionReport.load(tmp_path).events] == [6]
    assert seen == [losses[2], losses[4], losses[4], losses[8]]


def test_the_values_are_in_the_event_file(tmp_path):
    callbacks = [CompreSSMCallback(**RULE)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=6, report_to="tensorboard")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    (size,) = events.Scalars("train/compressm/total_state_size")
    assert (size.step, size.value) == (4, sum(state_sizes(trainer.model)))
    assert events.Scalars("train/compressm/seconds")


def test_each_trial_of_a_search_starts_from_the_full_size(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trainer = Trainer(
        model_init=lambda: tiny_lm(state_size=32),
        args=arguments(tmp_path, **EVALUATE, **SAVE),
        train_dataset=Windows(),
        eval_dataset=Windows(count=8),
        callbacks=[CompreSSMCallback(**RULE)],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, n_trials=2
    )
    assert best.objective > 0
    for run in ("run-0", "run-1"):
        (event,) = CompressionReport.load(tmp_path / run).events
        assert [layer.before for layer in event.layers] == [32, 32]
        assert max(layer.after for layer in event.layers) < 32
        assert CompressionReport.load(tmp_path / run / "checkpoint-8").events == [event]


class OutOfMemory(TrainerCallback):
    """As the device says it, in the first run, after a step."""

    def __init__(self, step):
        self.step, self.done = step, False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            raise RuntimeError("CUDA out of memory.")


def test_a_smaller_batch_is_found_before_the_first_reduction(tmp_path):
    callbacks = [CompreSSMCallback(**RULE), OutOfMemory(1)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=6, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 3
    assert [event.step for event in CompressionReport.load(tmp_path).events] == [4]
    assert max(state_sizes(trainer.model)) < 32


def test_a_run_is_not_begun_again_with_a_model_that_has_been_reduced(tmp_path):
    callbacks = [CompreSSMCallback(**RULE), OutOfMemory(5)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=6, auto_find_batch_size=True)
    with pytest.raises(UnsupportedSetupError, match="set per_device_train_batch_size to what fits"):
        trainer.train()


def test_averaged_copies_are_refused_with_the_way_out(tmp_path, caplog):
    model = tiny_lm(state_size=32)
    trainer = make_trainer(tmp_path, model, [CompreSSMCallback(**RULE)], max_steps=6)
    average = AveragedModel(model)
    with pytest.raises(UnsupportedSetupError, match="Make it after the last reduction, and delete this one"):
        trainer.train()
    with pytest.raises(UnsupportedSetupError, match="AveragedModel"):
        compress(model, tolerance=0.1)
    assert state_sizes(model) == [32, 32]
    del average
    trainer.train()
    assert max(state_sizes(model)) < 32
    average = AveragedModel(model)  # of the reduced model: nothing is left to reduce
    average.update_parameters(model)


def test_an_average_begun_during_the_run_keeps_the_sizes(tmp_path, caplog):
    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                self.average = AveragedModel(model)
            if state.global_step >= 2:
                self.average.update_parameters(model)

    trainer = make_trainer(tmp_path, callbacks=[CompreSSMCallback(**RULE), Average()], max_steps=6)
    trainer.train()
    assert state_sizes(trainer.model) == [32, 32]
    assert "keeps its 32 states: a torch.optim.swa_utils.AveragedModel holds copies" in caplog.text


def test_a_loss_that_is_not_a_number_reduces_nothing_and_is_told(tmp_path, caplog):
    class Nan(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss * torch.nan if self.state.global_step == 3 and model.training else loss

    callback = CompreSSMCallback(**RULE)
    args = arguments(tmp_path, max_steps=6)
    trainer = Nan(model=tiny_lm(), args=args, train_dataset=Windows(), callbacks=[callback])
    trainer.train()
    assert state_sizes(trainer.model) == [32, 32]
    assert "model.layers.1.mixer keeps its 32 states" in caplog.text
    assert all("found NaN or infinity" in layer.note for layer in CompressionReport.load(tmp_path).events[0].layers)


def test_unstable_dynamics_leave_the_layer_alone(tmp_path, caplog):
    class Unstable(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.model.layers[0].mixer.nu_log[3] = -50.0  # |λ| = 1 in any precision

    trainer = make_trainer(tmp_path, callbacks=[Unstable(), CompreSSMCallback(**RULE)], max_steps=6)
    trainer.train()
    first, second = state_sizes(trainer.model)
    assert first == 32 > second
    assert "model.layers.0.mixer keeps its 32 states" in caplog.text


def mamba2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 16}
    return ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))


def sizes_of(model):
    return [layer.state_size for layer in model.config.per_layer_config]


@pytest.mark.parametrize("best", ["larger", "smaller"])
def test_a_best_model_of_other_sizes_is_trained_evaluated_and_saved(tmp_path, best):
    """Put into the record by hand, because a reduction clears it."""

    class Choose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and not self.done:
                self.done = True
                state.best_model_checkpoint = str(source / f"checkpoint-{2 if best == 'larger' else 6}")
                args.load_best_model_at_end = True

    Choose.done = False
    rule = {"reduction_fraction": 0.5, "end": 3, "num_reductions": 1}
    source, options = tmp_path / "source", {"max_steps": 6, **SAVE}
    make_trainer(source, mamba2(), [CompreSSMCallback(**rule | {"reduction_fraction": 0.75})], **options).train()
    trainer = make_trainer(tmp_path / "run", mamba2(), [Choose(), CompreSSMCallback(**rule)], **options)
    trainer.train()
    loaded, full = sizes_of(trainer.model), sizes_of(mamba2())
    assert loaded == full if best == "larger" else max(loaded) < full[0] / 2
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Windows(count=4)).predictions is not None
    owned = [id(param) for group in trainer.optimizer.param_groups for param in group["params"]]
    assert sorted(owned) == sorted(id(param) for param in trainer.model.parameters())
    trainer.save_model(tmp_path / "model")
    again = type(trainer.model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in again.state_dict().items())
    trainer.args.load_best_model_at_end = False
    trainer.train()
    assert all(after <= before / 2 for after, before in zip(sizes_of(trainer.model), loaded, strict=True))
    resumed = make_trainer(tmp_path / "run", mamba2(), [CompreSSMCallback(**rule)], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_equal_bit_for_bit(resumed, trainer)
