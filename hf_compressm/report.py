"""What was reduced, when, and at what cost: a record that is saved beside the model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .plotting import plot_run

REPORT_NAME = "compression_report.json"
REDUCED, ROLLED_BACK_TO = "compressm/layers_reduced", "compressm/rolled_back_to"
"""In the entries that an event, and going back to before one, leave in the log of the Trainer."""


@dataclass
class LayerReport:
    """One layer in one event.

    Attributes:
        name: of the layer in the model.
        before, after: state sizes; equal if the layer was left alone.
        method: that reduced it; empty if it was left alone.
        energy_discarded: fraction of Σσ that was cut off.
        error_bound: H∞ bound of the error of the layer's map, ``2 Σ_{i>r} σ_i``; None where there is none.
        relative_error: error of the layer's output relative to it: in the H₂ norm for a time-invariant layer, on
            inputs held out from the fit for a selective one; None where it is not known.
        hankel_singular_values: before the event, descending.
        note: why the layer was left alone, if it was.
    """

    name: str
    before: int
    after: int
    method: str = ""
    energy_discarded: float = 0.0
    error_bound: float | None = None
    relative_error: float | None = None
    hankel_singular_values: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class CompressionEvent:
    """One pass over the model.

    Attributes:
        layers: every reducible layer.
        seconds: how long it took.
        step: the optimizer step after which it took place; None outside training.
        dry_run: nothing was changed.
        metric_before, metric_after: `rollback_metric` at the last evaluation before and the first one after; None
            where none was asked for, or none took place.
        rolled_back_at: the optimizer step after which the model went back to before this event; None if it did not.
        rule: the rank rule, as in "tolerance=0.05"; empty in a report that does not tell.
        log_entries: number of entries in the Trainer's `log_history` when a checkpoint on disk was reduced: they
            tell of the model before. None for any other reduction.
    """

    layers: list[LayerReport]
    seconds: float
    step: int | None = None
    dry_run: bool = False
    metric_before: float | None = None
    metric_after: float | None = None
    rolled_back_at: int | None = None
    rule: str = ""
    log_entries: int | None = None

    @property
    def in_training(self) -> bool:
        """Whether it took place in a run, and not on a finished model or a checkpoint on disk."""
        return self.step is not None and self.log_entries is None

    @property
    def changed(self) -> bool:
        """Whether any layer has a new size."""
        return any(layer.after != layer.before for layer in self.layers)

    def summary(self) -> dict[str, float]:
        """Numbers for a logger: sizes, and over the reduced layers the largest discarded energy and bound."""
        reduced = [layer for layer in self.layers if layer.after != layer.before]
        bounds = [layer.error_bound for layer in reduced if layer.error_bound is not None]
        errors = [layer.relative_error for layer in reduced if layer.relative_error is not None]
        return {
            "compressm/total_state_size": sum(layer.after for layer in self.layers),
            REDUCED: len(reduced),
            "compressm/max_energy_discarded": max((layer.energy_discarded for layer in reduced), default=0.0),
            **({"compressm/max_error_bound": max(bounds)} if bounds else {}),
            **({"compressm/max_relative_error": max(errors)} if errors else {}),
            "compressm/seconds": self.seconds,
            **{f"compressm/state_size/{layer.name}": layer.after for layer in self.layers},
        }

    def __str__(self) -> str:
        """One line."""
        summary = self.summary()
        sizes = ", ".join(f"{layer.before}→{layer.after}" for layer in self.layers)
        parts = [f"discarded at most {summary['compressm/max_energy_discarded']:.2%} of the Hankel singular values"]
        for key, name in (("max_error_bound", "H∞ error"), ("max_relative_error", "relative error")):
            if f"compressm/{key}" in summary:
                parts.append(f"{name} at most {summary[f'compressm/{key}']:.3g}")
        where = "" if self.step is None else f"step {self.step}: "
        would = "would reduce" if self.dry_run else "reduced"
        return (
            f"{where}{would} {summary[REDUCED]} of {len(self.layers)} layers, states {sizes}; "
            f"{', '.join(parts)}, in {self.seconds:.2f} s"
        )


@dataclass
class CompressionReport:
    """All events of a run, the options they followed, and the run itself. Saved as `compression_report.json`.

    Attributes:
        config: the options, as `CompressionConfig(**config)` takes them.
        events: one for each pass over the model.
        run: command, seed, hyperparameters, data, versions, machine and speed, as far as they are known.

    Example:

    ```python
    >>> from hf_compressm import CompressionReport

    >>> report = CompressionReport.load("outputs/demo")  # doctest: +SKIP
    >>> report.plot("report.png")  # doctest: +SKIP

    ```
    """

    config: dict
    events: list[CompressionEvent] = field(default_factory=list)
    run: dict = field(default_factory=dict)

    @property
    def state_sizes(self) -> dict[str, int]:
        """The sizes of the layers after the last event that was not taken back; empty without events."""
        sizes = {layer.name: layer.before for layer in self.events[0].layers} if self.events else {}
        for event in self.events:
            if event.rolled_back_at is None:
                sizes |= {layer.name: layer.after for layer in event.layers}
        return sizes

    @property
    def taken_back(self) -> list[CompressionEvent]:
        """The events that `rollback_metric` undid."""
        return [event for event in self.events if event.rolled_back_at is not None]

    def rollback_summary(self) -> dict[str, float]:
        """Numbers for a logger when `rollback_metric` has just undone events."""
        first, sizes = self.taken_back[0], self.state_sizes
        return {
            ROLLED_BACK_TO: first.step,
            "compressm/metric_before": first.metric_before,
            "compressm/metric_after": first.metric_after,
            "compressm/total_state_size": sum(sizes.values()),
            **{f"compressm/state_size/{name}": size for name, size in sizes.items()},
        }

    def rollback_line(self) -> str:
        """The same for people."""
        first, sizes = self.taken_back[0], ", ".join(map(str, self.state_sizes.values()))
        return (
            f"step {first.rolled_back_at}: back to the model before the reduction at step {first.step}, states "
            f"{sizes}, because the metric went from {first.metric_before:.5g} to {first.metric_after:.5g}; reductions "
            "end here"
        )

    def to_dict(self) -> dict:
        """Plain types only, as `from_dict` and JSON take them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "CompressionReport":
        """The inverse of `to_dict`."""
        events = [
            CompressionEvent(**{**event, "layers": [LayerReport(**layer) for layer in event["layers"]]})
            for event in data["events"]
        ]
        return cls(config=data["config"], events=events, run=data.get("run", {}))

    def save(self, path: str | Path) -> Path:
        """Write the report to a file, or into a directory under its standard name; the path is returned."""
        path = _resolve(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "CompressionReport":
        """Read a report from a file, or from a directory that holds one.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is something else.
        """
        path = _resolve(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a compression report: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        """A table of the layers: sizes before the first and after the last event."""
        if not self.events:
            return "no reduction has taken place"
        first, last = self.events[0].layers, self.events[-1].layers
        width = max(len(layer.name) for layer in first)
        rows = [f"{'layer':<{width}}  {'before':>6}  {'after':>6}  note"]
        sizes = self.state_sizes
        for old, new in zip(first, last, strict=True):
            rows.append(f"{old.name:<{width}}  {old.before:>6}  {sizes[new.name]:>6}  {new.note}".rstrip())
        rows += [f"The reduction at step {e.step} was taken back at step {e.rolled_back_at}." for e in self.taken_back]
        return "\n".join(rows)

    def plot(self, path: str | Path | None = None, log_history: Sequence[dict] = ()):
        """Draw the state sizes over the steps, the loss with the reductions marked, and the spectra of the layers.

        Args:
            path: where to save the figure, if anywhere.
            log_history: `trainer.state.log_history`; without it the loss is left out.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no event to draw.
        """
        return plot_run(self.events, log_history, path)


def _resolve(path: str | Path) -> Path:
    path = Path(path)
    return path / REPORT_NAME if path.is_dir() or not path.suffix else path
