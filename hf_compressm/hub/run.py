"""A run as its files tell it: `compression_report.json`, `trainer_state.json`, `config.json` and the weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..report import REDUCED, REPORT_NAME, ROLLED_BACK_TO, CompressionReport

_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_input_tokens_seen")


@dataclass
class Run:
    """What is known of a run.

    Attributes:
        name: of the model.
        report: what was reduced.
        log_history: of the Trainer; empty without one.
        max_steps: of the run; None without a Trainer.
        config: of the model, as in its file; empty if there is none.
        parameters: number of parameters in the weights; None without weights.
    """

    name: str
    report: CompressionReport
    log_history: list[dict]
    max_steps: int | None
    config: dict
    parameters: int | None

    @classmethod
    def load(cls, directory: str | Path) -> "Run":
        """Read a directory that a Trainer, or `hf-compressm reduce`, wrote to.

        Raises:
            ValueError: there is no report in it.
        """
        directory = Path(directory)
        if not (directory / REPORT_NAME).is_file():
            raise ValueError(
                f"there is no {REPORT_NAME} in {directory}: expected the output directory of a run with "
                "CompreSSMCallback, one of its checkpoints, or what `hf-compressm reduce` wrote."
            )
        state = _trainer_state(directory)
        config = _read_json(directory / CONFIG_NAME)
        return cls(
            directory.resolve().name,
            CompressionReport.load(directory),
            state.get("log_history", []),
            state.get("max_steps"),
            config,
            _count_parameters(directory),
        )

    @property
    def changed_events(self) -> list:
        """The events that changed the model, and were not taken back."""
        events = self.report.events
        return [event for event in events if event.changed and not event.dry_run and event.rolled_back_at is None]

    @property
    def in_training(self) -> bool:
        """Whether any of these events took place in the run itself."""
        return any(event.in_training for event in self.changed_events)

    def evaluations(self, first: int = 0) -> list[tuple[int, dict[str, float]]]:
        """Steps and metrics of the evaluations, in the order of the run, of the model that is there now.

        After a reduction outside the run, only those since then: the others are of a larger model. None from between a
        reduction and the moment it was taken back, the one that decided so included.

        Args:
            first: entry of `log_history` to begin with.
        """
        outside = [event.log_entries for event in self.changed_events if not event.in_training]
        first = max([first, *(len(self.log_history) if entries is None else entries for entries in outside)])
        found, undone = [], self._undone()
        for index, entry in enumerate(self.log_history[first:], first):
            if index in undone:
                continue
            metrics = {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_") and key.removeprefix("eval_") not in _NOT_METRICS
            }
            if metrics:
                found.append((entry.get("step", 0), metrics))
        return found

    def _undone(self) -> range:
        """Entries of the log that tell of a model that was taken back; a run goes back once at most."""
        steps = [entry.get(ROLLED_BACK_TO) for entry in self.log_history]
        end = next((index for index, step in enumerate(steps) if step is not None), 0)
        reduced = (i for i, e in enumerate(self.log_history[:end]) if REDUCED in e and e["step"] == steps[end])
        return range(next(reduced, end), end)

    @property
    def best(self) -> dict[str, int]:
        """Step of the model that `load_best_model_at_end` brought back and length of the log then; empty if none."""
        best = self.report.run.get("best", {})
        return {} if best and self.evaluations(best["log_entries"]) else best

    def final_evaluation(self) -> tuple[int, dict[str, float]] | None:
        """That of the model that was saved: the last one, or the last one up to the best step."""
        step = self.best.get("step", math.inf)
        return next((e for e in reversed(self.evaluations()) if e[0] <= step), None)


def _trainer_state(directory: Path) -> dict:
    """That of the directory, or of its last checkpoint; empty if there is none."""
    checkpoints = [p for p in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    newest_first = sorted(checkpoints, key=lambda path: -int(path.name.rpartition("-")[2]))
    return next(filter(None, (_read_json(d / TRAINER_STATE_NAME) for d in (directory, *newest_first))), {})


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _count_parameters(directory: Path) -> int | None:
    """Numbers in the safetensors files, of which only the headers are read."""
    total = 0
    for file in directory.glob("*.safetensors"):
        if file.name.startswith(("model", "adapter_model")):
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            total += sum(math.prod(shape) for shape in shapes)
    return total or None
