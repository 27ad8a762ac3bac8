"""The model card of a run, made of its files alone."""

from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import CompressionConfig
from ..report import CompressionEvent
from .run import Run

PLOT_NAME = "compression_plot.png"
_TASKS = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}
_STOCK_TYPES = ("mamba", "mamba2")


def build_card(run: Run, *, plot: str | None = None, has_code: bool = False, **details: Any) -> ModelCard:
    """The card of a run.

    Args:
        run: as loaded from its directory.
        plot: file name of its figure beside the card, if there is one.
        has_code: whether the modeling code lies beside the weights.
        **details: what the files do not tell, by the names of `Trainer.create_model_card`: `model_name`, `language`,
            `license`, `tags`, `finetuned_from`, `tasks`, `dataset` (its name), `dataset_tags` (its name on the Hub),
            `dataset_args` (its configuration), `evaluation_command`. They go before those that the report holds.

    Raises:
        ValueError: the report holds no reduction that took place.
    """
    events = run.changed_events
    if not events:
        raise ValueError("there is nothing to tell: no reduction has taken place (or only in a dry run).")
    details = run.report.run.get("card", {}) | {key: value for key, value in details.items() if value is not None}
    name = details.get("model_name") or run.name
    record = run.report.run
    return ModelCard.from_template(
        _metadata(run, name, details),
        template_str=(files(__package__) / "card_template.md").read_text(encoding="utf-8"),
        name=name,
        model_type=run.config.get("model_type", "unknown type"),
        in_training=run.in_training,
        base_model=details.get("finetuned_from"),
        states_before=sum(layer.before for layer in events[0].layers),
        states_after=sum(layer.after for layer in events[-1].layers),
        overview=_overview(run),
        plot=plot,
        evaluations=_evaluation_table(run),
        evaluated_by=_evaluated_by(run, details),
        schedule=_schedule(run, events),
        layers=_layer_table(events),
        notes=_notes(run),
        data=_data(run, details),
        command=record.get("command"),
        hyperparameters=record.get("hyperparameters", {}),
        options=_options(run.report.config),
        machine=record.get("machine"),
        versions=", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items()),
        loading=_loading(run, name, has_code),
        limits=_limits(run),
    )


def _metadata(run: Run, name: str, details: dict) -> ModelCardData:
    task = _listed(details.get("tasks"))
    tags = ["compressm", "state-space-model", "balanced-truncation", run.config.get("model_type")]
    data = {
        "language": details.get("language"),
        "license": details.get("license"),
        "library_name": "transformers",
        "base_model": details.get("finetuned_from"),
        "datasets": _listed(details.get("dataset_tags")) or None,
        "tags": list(dict.fromkeys(filter(None, [*tags, *_listed(details.get("tags"))]))),
        "pipeline_tag": task[0] if task else _task(run),
    }
    final = run.final_evaluation()
    if final is None:
        return ModelCardData(**data)
    dataset = _data_name(details)
    results = [
        EvalResult(
            task_type=data["pipeline_tag"] or "other",
            dataset_type=(_listed(details.get("dataset_tags")) or [dataset])[0],
            dataset_name=dataset,
            dataset_config=(_listed(details.get("dataset_args")) or [None])[0],
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in final[1].items()
    ]
    return ModelCardData(
        **data, metrics=[result.metric_type for result in results], model_name=name, eval_results=results
    )


def _task(run: Run) -> str | None:
    """The task of the class that was saved; None where it reads numbers, which may be anything."""
    architecture = (run.config.get("architectures") or [""])[0]
    if run.config.get("model_type") == "mimo_ssm" and run.config.get("vocab_size") is None:
        return None
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def _overview(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    before, after = (run.report.run.get("parameters", {}).get(when) for when in ("before", "after"))
    after = run.parameters or after
    if after:
        rows.append(("parameters", f"{before:,}" if before else "", f"{after:,}"))
    times = run.report.run.get("step_ms", {})
    all_in_training = all(event.in_training for event in run.changed_events)  # else these are of another model
    if all_in_training and times.get("before") and times.get("after"):
        faster = times["before"] / times["after"]
        rows.append(("training step, median", f"{times['before']:.1f} ms", f"{times['after']:.1f} ms ({faster:.2f}×)"))
    return rows


def _evaluation_table(run: Run) -> str:
    """The last evaluation before the first reduction, the first one after the last, and that of the saved model."""
    evaluations, events = run.evaluations(), run.changed_events
    if not evaluations:
        loss = run.report.run.get("loss")  # of a reduction outside training
        when = ["before", "after"] if len(events) == 1 else ["before the last reduction", "after it"]
        return _table([["", *when], ["loss", _number(loss["before"]), _number(loss["after"])]]) if loss else ""
    # an evaluation at the step of an event comes after the event
    before = [e for e in evaluations if e[0] < events[0].step]
    after = [e for e in evaluations if e[0] >= events[-1].step]
    columns = {
        "before the first reduction": next(reversed(before), None),
        "after the last": next(iter(after), None),
        "of the best model, which was kept" if run.best else "at the end": run.final_evaluation(),
    }
    columns = {title: found for title, found in columns.items() if found is not None}
    names = list(dict.fromkeys(metric for _, metrics in columns.values() for metric in metrics))
    rows = [["", *columns], ["optimizer step", *(f"{step:,}" for step, _ in columns.values())]]
    rows += [[name, *(_number(metrics.get(name)) for _, metrics in columns.values())] for name in names]
    return _table(rows)


def _evaluated_by(run: Run, details: dict) -> str:
    if not run.evaluations() and (loss := run.report.run.get("loss")):
        return f"On {loss['data']}, held out from the reduction, by the command below."
    if details.get("evaluation_command"):
        return f"Evaluated with `{details['evaluation_command']}`."
    return "Evaluated by `Trainer.evaluate()` in the command below, on its evaluation set."


def _schedule(run: Run, events: list[CompressionEvent]) -> str:
    of_config = "{}={:g}".format(*CompressionConfig(**run.report.config).rule)
    rules = ", ".join(f"`{rule}`" for rule in dict.fromkeys(event.rule or of_config for event in events))
    if not run.in_training:
        passes = "one pass" if len(events) == 1 else f"{len(events)} passes"
        model = "finished model" if events[-1].step is None else f"checkpoint of step {events[-1].step:,}"
        return f"Rank rule: {rules}, in {passes} over the {model}."
    of = f" of {run.max_steps:,}" if run.max_steps else ""
    steps = ", ".join(_when(event) for event in events)
    seconds = sum(event.seconds for event in run.report.events)
    return (
        f"Rank rule: {rules} per reduction. Reductions after the optimizer steps {steps}{of}; all of them "
        f"took {seconds:.1f} s together."
    )


def _when(event: CompressionEvent) -> str:
    step = "the last" if event.step is None else f"{event.step:,}"
    return step if event.in_training else f"{step} (outside training)"


def _layer_table(events: list[CompressionEvent]) -> str:
    rows = [["layer", "states before", "after", "method", "discarded", "H∞ bound", "output error"]]
    for index, layer in enumerate(events[0].layers):
        history = [event.layers[index] for event in events if event.layers[index].after < event.layers[index].before]
        rows.append(
            [
                f"`{layer.name}`",
                f"{layer.before}",
                f"{events[-1].layers[index].after}",
                ", ".join(dict.fromkeys(entry.method for entry in history)) or "-",
                ", ".join(f"{entry.energy_discarded:.2%}" for entry in history) or "-",
                ", ".join(_number(entry.error_bound) for entry in history) or "-",
                ", ".join(_number(entry.relative_error) for entry in history) or "-",
            ]
        )
    return _table(rows)


def _notes(run: Run) -> list[str]:
    """What was taken back, and why layers were left alone."""
    events = run.report.events
    return [
        f"The reduction after step {event.step} was taken back at step {event.rolled_back_at}."
        for event in events
        if event.rolled_back_at is not None
    ] + [
        f"`{layer.name}` kept its {layer.before} states"
        + ("" if event.step is None else f" at step {event.step}")
        + f": {layer.note}"
        for event in events
        for layer in event.layers
        if layer.note
    ]


def _data_name(details: dict) -> str:
    found = _listed(details.get("dataset")) or _listed(details.get("dataset_tags"))
    return ", ".join(found) or "unknown"


def _data(run: Run, details: dict) -> str:
    name, calibration = _data_name(details), run.report.run.get("calibration_data")
    names = [*([name] if name != "unknown" else []), *([f"{calibration} (for the reduction)"] if calibration else [])]
    return ", ".join(names) or "not recorded"


def _options(config: dict) -> str:
    defaults = CompressionConfig().to_dict()
    changed = [f"`{key}={value!r}`" for key, value in config.items() if value != defaults.get(key)]
    return ", ".join(changed) or "none"


def _loading(run: Run, name: str, has_code: bool) -> str:
    architecture = (run.config.get("architectures") or [""])[0]
    auto = "AutoModelForSequenceClassification" if "Classification" in architecture else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}"]
    if run.config.get("model_type") in _STOCK_TYPES:
        return "\n".join([*lines, "", f'model = {auto}.from_pretrained("{name}")  # a stock checkpoint'])
    lines += ["import hf_compressm  # pip install hf-compressm", "", f'model = {auto}.from_pretrained("{name}")']
    if has_code:
        lines += ["", "# or without the package, with the code beside the weights:"]
        lines += [f'model = {auto}.from_pretrained("{name}", trust_remote_code=True)']
    return "\n".join(lines)


def _limits(run: Run) -> str:
    return (
        "The figures are those of one run with one seed."
        if run.evaluations() or run.report.run.get("loss")
        else "This card reports no evaluation: measure before you rely on it."
    )


def _listed(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
