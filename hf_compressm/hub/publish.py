"""What goes to the Hub with a model: report, figure, card and code, written into the directory that is uploaded."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..report import REPORT_NAME, CompressionReport
from .card import PLOT_NAME, build_card
from .remote_code import bundle_remote_code
from .run import Run

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"


@dataclass
class Publication:
    """Report and state of a run, and where they go when its model is pushed.

    Attributes:
        report: of the run, while it grows.
        state: of the Trainer, while it grows.
    """

    report: CompressionReport
    state: TrainerState

    @property
    def reduced(self) -> bool:
        """Whether any reduction has taken place and was not taken back."""
        events = self.report.events
        return any(event.changed and not event.dry_run and event.rolled_back_at is None for event in events)

    def write(self, directory: str | Path, **details: Any) -> list[Path]:
        """Put report, state, figure, code and card into the directory of a saved model; a failure is a warning.

        Args:
            directory: that is to be uploaded.
            **details: of the card, as `build_card` takes them; kept in the report.

        Returns:
            The files written.
        """
        directory = Path(directory)
        details = {key: value for key, value in details.items() if value is not None}
        if details:
            self.report.run["card"] = self.report.run.get("card", {}) | details
        self.report.save(directory)
        if not directory.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):  # where it is, and marks that all is written
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
        try:
            return [directory / REPORT_NAME, directory / TRAINER_STATE_NAME, *write_card(directory)]
        except Exception as error:  # a run must not end because its card could not be written
            logger.warning("The model card could not be written: %s: %s", type(error).__name__, error)
            return [directory / REPORT_NAME, directory / TRAINER_STATE_NAME]

    def attach(self, model: PreTrainedModel) -> None:
        """Let `model.push_to_hub` and `model.save_pretrained(push_to_hub=True)` carry these files."""
        model._upload_modified_files = _Upload(model, self)


@dataclass
class _Upload:
    """Stands for `model._upload_modified_files`, the last thing that `push_to_hub` calls: after the generic card."""

    model: PreTrainedModel
    publication: Publication

    def __call__(self, working_dir: str, repo_id: str, *args, **kwargs):
        self.publication.write(working_dir, model_name=repo_id.rpartition("/")[2])
        return type(self.model)._upload_modified_files(self.model, working_dir, repo_id, *args, **kwargs)


def write_card(directory: str | Path, **details: Any) -> list[Path]:
    """Write figure, code and card of a run into its directory, from the files there.

    Without matplotlib there is no figure. Adapters of PEFT keep the card that PEFT wrote.

    Args:
        directory: of the run.
        **details: as for `build_card`.

    Returns:
        The files written.

    Raises:
        ValueError: there is no report, or no reduction in it.
    """
    directory = Path(directory)
    run = Run.load(directory)
    code = bundle_remote_code(directory) if (directory / CONFIG_NAME).is_file() else []
    written = list(code)
    try:
        if run.changed_events:
            run.report.plot(directory / PLOT_NAME, run.log_history)
            written.append(directory / PLOT_NAME)
    except ImportError:
        logger.info("No figure for the model card: matplotlib is not installed.")
    present = _present_card(directory)
    if present is not None and present.data.get("library_name") == "peft":
        return written
    tags = [*(details.pop("tags", None) or []), *((present.data.tags or []) if present is not None else [])]
    plot = PLOT_NAME if directory / PLOT_NAME in written else None
    card = build_card(run, plot=plot, has_code=bool(code), tags=tags or None, **details)
    card.save(directory / CARD_NAME)
    return [*written, directory / CARD_NAME]


def copy_published(source: Path, target: Path) -> None:
    """Copy what `write_card` and `Publication.write` put beside a model, not the model, to another directory."""
    names = {CARD_NAME, PLOT_NAME, REPORT_NAME, TRAINER_STATE_NAME}
    for file in source.iterdir():
        if file.name in names or file.suffix == ".py":
            shutil.copy(file, target / file.name)


def _present_card(directory: Path) -> ModelCard | None:
    path = directory / CARD_NAME
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
