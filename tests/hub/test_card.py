"""The card against the files of the run that it tells about."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from runs import make_trainer
from tiny import tiny_lm
from transformers import TrainerCallback

from hf_compressm import CompressionReport, CompreSSMCallback, compress
from hf_compressm.hub import Run, build_card, write_card
from hf_compressm.report import REPORT_NAME

SCHEMA = json.loads((Path(__file__).parent / "model_card_schema.json").read_text())
DETAILS = {
    "model_name": "my-ssm",
    "license": "mit",
    "language": "en",
    "dataset": "plays",
    "dataset_tags": "someone/plays",
    "tasks": "text-generation",
}


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "tiny-ssm"))


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rows(card, first):
    """Cells of the first row of any table that starts with `first`."""
    line = next(line for line in card.text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_figures_are_those_of_the_files(run_dir):
    card, report = build_card(Run.load(run_dir)), CompressionReport.load(run_dir)
    state = json.loads((run_dir / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert rows(card, "optimizer step") == ["3", "6", "10"]
    assert rows(card, "loss") == [f"{losses[step]:.4g}" for step in (3, 6, 10)]
    first, last = report.events[0].layers[0], report.events[1].layers[0]
    cells = rows(card, "`model.layers.0.mixer`")
    assert cells[:2] == [f"{first.before}", f"{last.after}"] == ["16", "4"]
    assert cells[3] == f"{first.energy_discarded:.2%}, {last.energy_discarded:.2%}"
    assert cells[4] == f"{first.error_bound:.4g}, {last.error_bound:.4g}"
    assert rows(card, "parameters") == ["11,520", f"{tiny_lm(state_size=4).num_parameters():,}"]
    assert "after the optimizer steps 4, 6 of 10" in card.text
    assert "`target_state_size=4`" in card.text
    times = report.run["step_ms"]
    assert rows(card, "training step, median")[0] == f"{times['before']:.1f} ms"
    assert rows(card, "seed") == ["42"]
    assert rows(card, "learning_rate") == ["5e-05"]


def test_a_changed_figure_of_the_files_changes_the_card(run_dir):
    before = build_card(Run.load(run_dir))

    def change_report(data):
        data["events"][1]["layers"][0] |= {"after": 5, "energy_discarded": 0.123}
        data["run"]["step_ms"]["before"] = 1234.5
        data["run"]["command"] = "python another.py"

    edit(run_dir / REPORT_NAME, change_report)
    edit(run_dir / "trainer_state.json", lambda data: data["log_history"][-2].update(eval_loss=9.75))
    changed = build_card(Run.load(run_dir))
    assert rows(changed, "`model.layers.0.mixer`")[1] == "5"
    assert rows(changed, "`model.layers.0.mixer`")[3].endswith("12.30%")
    assert rows(changed, "training step, median")[0] == "1234.5 ms"
    assert "python another.py" in changed.text
    assert rows(changed, "loss")[2] == "9.75" != rows(before, "loss")[2]
    assert changed.data.eval_results[0].metric_value == 9.75
    assert changed.text != before.text


def test_metadata_survives_the_round_trip_and_fits_the_schema(run_dir):
    write_card(run_dir, **DETAILS)
    card = ModelCard.load(run_dir / "README.md")
    jsonschema.validate(card.data.to_dict(), SCHEMA)
    (result,) = card.data.eval_results
    assert result == EvalResult(
        task_type="text-generation",
        dataset_type="someone/plays",
        dataset_name="plays",
        metric_type="loss",
        metric_name="loss",
        metric_value=Run.load(run_dir).evaluations()[-1][1]["loss"],
    )
    assert card.data.model_name == "my-ssm"
    card.save(run_dir / "again.md")
    assert ModelCard.load(run_dir / "again.md").data.to_dict() == card.data.to_dict()
    assert {"compressm", "mimo_ssm"} <= set(card.data.tags)


def test_the_schema_refuses_what_the_hub_would(run_dir):
    data = build_card(Run.load(run_dir), **DETAILS).data.to_dict()
    for broken in ({"license": "MIT License"}, {"language": "English"}, {"pipeline_tag": "Text generation"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | broken, SCHEMA)


def test_the_card_says_how_to_load_the_model(run_dir):
    assert "trust_remote_code" not in build_card(Run.load(run_dir)).text
    write_card(run_dir)
    text = (run_dir / "README.md").read_text()
    assert "import hf_compressm" in text
    assert "trust_remote_code=True" in text
    edit(run_dir / "config.json", lambda data: data.update(model_type="mamba"))
    assert "a stock checkpoint" in build_card(Run.load(run_dir)).text


def test_a_card_written_twice_stays_the_same_and_keeps_the_tags(run_dir):
    write_card(run_dir, tags=["mine"])
    once = (run_dir / "README.md").read_text()
    write_card(run_dir)
    assert (run_dir / "README.md").read_text() == once
    assert "mine" in ModelCard.load(run_dir / "README.md").data.tags


def test_a_reduction_after_training_has_a_card_too(tmp_path):
    model = tiny_lm(state_size=16)
    report = compress(model, target_state_size=8)
    model.save_pretrained(tmp_path)
    report.run["loss"] = {"before": 1.25, "after": 1.5, "data": "32 sequences of plays.txt"}
    report.save(tmp_path)
    card = build_card(Run.load(tmp_path))
    assert "after its training" in card.text
    assert rows(card, "loss") == ["1.25", "1.5"]
    assert "32 sequences of plays.txt" in card.text
    jsonschema.validate(card.data.to_dict(), SCHEMA)


def test_a_reduction_after_a_run_has_none_of_its_evaluations(run_dir):
    edit(run_dir / REPORT_NAME, lambda data: [event.update(step=None) for event in data["events"]])
    card = build_card(Run.load(run_dir))
    assert card.data.eval_results is None
    assert "No evaluation was recorded" in card.text
    assert "in 2 passes over the finished model" in card.text
    edit(run_dir / REPORT_NAME, lambda data: data["events"][0].update(step=4))
    assert "after the optimizer steps 4, the last (outside training) of 10" in build_card(Run.load(run_dir)).text


def test_a_report_without_rules_names_that_of_its_options(run_dir):
    edit(run_dir / REPORT_NAME, lambda data: [event.pop("rule") for event in data["events"]])
    assert "Rank rule: `target_state_size=4` per reduction." in build_card(Run.load(run_dir)).text


@pytest.mark.parametrize("evaluated_again", [False, True])
def test_the_figures_are_those_of_the_best_model_if_that_is_the_one_saved(tmp_path, evaluated_again):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "max_steps": 8}
    options |= {"load_best_model_at_end": True, "greater_is_better": True, "eval_strategy": "steps"}  # not the last
    callback = CompreSSMCallback(target_state_size=4, start=0, end=2, num_reductions=1)
    trainer = make_trainer(tmp_path, tiny_lm(state_size=16), [callback], **options)
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 8
    saved = trainer.evaluate() if evaluated_again else {}
    trainer.save_model()
    trainer.save_state()
    card, run = build_card(Run.load(tmp_path)), Run.load(tmp_path)
    expected = saved.get("eval_loss") or dict(run.evaluations())[best]["loss"]
    assert card.data.eval_results[0].metric_value == expected == pytest.approx(trainer.state.best_metric)
    assert rows(card, "optimizer step")[-1] == ("8" if evaluated_again else f"{best}")
    assert ("of the best model, which was kept" in card.text) == (not evaluated_again)


def test_one_event_has_whole_numbers_on_its_axis():
    axes = compress(tiny_lm(state_size=16), target_state_size=8).plot().axes[0]
    assert axes.get_xlabel() == "event"
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_without_a_reduction_there_is_no_card(run_dir, tmp_path):
    edit(run_dir / REPORT_NAME, lambda data: [event.update(dry_run=True) for event in data["events"]])
    with pytest.raises(ValueError, match="no reduction has taken place"):
        write_card(run_dir)
    with pytest.raises(ValueError, match=f"there is no {REPORT_NAME}"):
        Run.load(tmp_path)


def test_a_reduction_that_was_taken_back_does_not_count(run_dir):
    edit(run_dir / REPORT_NAME, lambda data: data["events"][1].update(rolled_back_at=8))
    card = build_card(Run.load(run_dir))
    assert rows(card, "`model.layers.0.mixer`")[:2] == ["16", "8"]
    assert "The reduction after step 6 was taken back at step 8." in card.text


class Worsens(TrainerCallback):
    """Makes the model worse after a step, so that the reduction before it is blamed."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 14:
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(-5)


def test_the_evaluation_that_took_a_reduction_back_is_not_of_the_model_saved(tmp_path):
    rule = {"reduction_fraction": 0.3, "start": 5, "end": 13, "num_reductions": 2, "rollback_metric": "loss"}
    options = {"max_steps": 15, "eval_strategy": "steps", "eval_steps": 5, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, None, [Worsens(), CompreSSMCallback(**rule)], **options)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert [event.rolled_back_at for event in CompressionReport.load(tmp_path).events] == [None, 15]
    assert losses[15] > losses[10]
    trainer.save_model()
    trainer.save_state()
    card = build_card(Run.load(tmp_path))
    assert card.data.eval_results[0].metric_value == losses[10]
    assert rows(card, "optimizer step") == ["5", "10", "10"]
    again = trainer.evaluate()["eval_loss"]  # at the same step, of the model that came back
    trainer.save_state()
    card = build_card(Run.load(tmp_path))
    assert card.data.eval_results[0].metric_value == again < losses[15]
    assert rows(card, "optimizer step") == ["5", "10", "15"]


def test_the_card_of_an_adapter_is_left_alone(run_dir):
    ModelCard("---\nlibrary_name: peft\n---\nan adapter").save(run_dir / "README.md")
    write_card(run_dir)
    assert "an adapter" in (run_dir / "README.md").read_text()
