"""Pushes of the Trainer, at the end and in the middle of a run, carry report, figure, card and code."""

from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub import Publication, copy_published
from ..report import CompressionReport


class Publishing:
    """Puts a `Publication` into the directories that the Trainer and the model upload.

    The Trainer writes its own card after the event `on_push_begin`, so that ours takes the place of the method that
    writes it; keywords of `trainer.push_to_hub` and `trainer.create_model_card` (`dataset`, `tasks`, `license`, ...)
    go into our card.

    Args:
        trainer: of the run; None leaves only `model.push_to_hub`.
        model: of the run.
        report, state: of the run.
    """

    def __init__(self, trainer: Trainer | None, model: nn.Module, report: CompressionReport, state: TrainerState):
        self.publication = Publication(report, state)
        if hasattr(model, "push_to_hub"):
            self.publication.attach(model)
        if trainer is not None:
            self._own_card = type(trainer).create_model_card.__get__(trainer)
            self._output_dir = trainer.args.output_dir
            trainer.create_model_card = self.create_model_card

    def create_model_card(self, *args, **details) -> None:
        """Stands for `Trainer.create_model_card`, which goes on writing the card of a run without reductions."""
        if not self.publication.reduced:
            self._own_card(*args, **details)
        elif self.publication.state.is_world_process_zero:
            self.publication.write(self._output_dir, **details)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Before a push in the middle of a run, which uploads the output directory with the model of a checkpoint."""
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        in_training = args.push_to_hub and args.hub_strategy != HubStrategy.END and checkpoint.is_dir()
        if in_training and state.is_world_process_zero and self.publication.reduced:
            name = args.hub_model_id.rpartition("/")[2] if args.hub_model_id else Path(args.output_dir).name
            self.publication.write(checkpoint, model_name=name)
            copy_published(checkpoint, Path(args.output_dir))
