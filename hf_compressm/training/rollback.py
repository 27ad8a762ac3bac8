"""Second thoughts: a reduction is judged by the next evaluation, and taken back if it cost too much."""

import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from ..config import CompressionConfig
from ..report import CompressionEvent
from ..surgery import Ranks, UnsupportedSetupError, check_replicas_equal, find_replicas, rebuild_reducer
from .checkpoint import all_ranks, callback_state, checkpoints, on_main
from .snapshot import Snapshot, SnapshotStore

logger = logging.getLogger(__name__)


class Rollback:
    """Watches `rollback_metric` of one run.

    The reference is the last evaluation before a reduction. Before the reduction the whole model and the optimizer's
    state go to disk. If the next evaluation is worse than the reference by more than the tolerance, both come back in
    place. Reductions between two evaluations are judged, and taken back, together.

    Args:
        config: with `rollback_metric`.
        output_dir: of the run, where snapshots are kept.
    """

    def __init__(self, config: CompressionConfig, output_dir: str):
        self._config = config
        self.metric = f"eval_{config.rollback_metric.removeprefix('eval_')}"
        greater = config.greater_is_better
        self._greater_is_better = not self.metric.endswith("loss") if greater is None else greater
        self._output_dir, self._store = output_dir, SnapshotStore(output_dir)
        self.reference: dict[str, float] | None = None
        self.pending: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: plain types only."""
        return {"reference": self.reference, "pending": self.pending}

    def resume(self, state: dict[str, Any], directories: list[Path]) -> None:
        """Go on from what `state` returned in another run.

        A decision whose snapshot is gone is dropped with a warning: the reduction stays.

        Args:
            state: of that run.
            directories: where its snapshots may be, besides the present output directory.
        """
        if state["reference"] is not None and self.metric in state["reference"]:
            self.reference = state["reference"]
        pending = state["pending"]
        if pending is None:
            return
        problem = f"its evaluations have no {self.metric}"
        if self.reference is not None:
            problem = on_main(lambda: self._fetch(pending, directories))
        if problem:
            logger.warning(
                "The reduction at step %d stays, whatever the next evaluation says, because there is nothing to go "
                "back to: %s.",
                pending["step"],
                problem,
            )
        else:
            self.pending = pending

    def _fetch(self, pending: dict[str, Any], directories: list[Path]) -> str:
        """Make sure of the snapshot that a decision needs; returns why it cannot be had, or ""."""
        problems = {}
        for store in (self._store, *map(SnapshotStore, directories)):
            if store.folder in problems:
                continue
            try:
                snapshot = store.read(pending["step"], pending["digest"])
                if store is not self._store:
                    self._store.write(pending["step"], snapshot)
                return ""
            except Exception as error:
                problems[store.folder] = str(error)
        return "; ".join(problems.values())

    def check_run(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, events: list[int], per_epoch: int | None
    ) -> None:
        """Refuse a run that cannot go back, would reduce before there is a reference, or never judge.

        Args:
            args, state: of the Trainer.
            model: not wrapped.
            events: the steps of the reductions.
            per_epoch: optimizer steps; None if that is not known.

        Raises:
            ValueError: what to do instead.
        """
        name = f"rollback_metric={self._config.rollback_metric!r}"
        if any(isinstance(param.data, DTensor) for param in model.parameters()):
            raise UnsupportedSetupError(
                f"{name} keeps the whole model, and found sharded parameters (DTensor), which it cannot put back. "
                "Use DistributedDataParallel, or leave `rollback_metric` out."
            )
        ahead = [event for event in events if event > state.global_step]
        if not ahead:
            return
        if args.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"{name} judges each reduction by evaluations; found eval_strategy='no'. Set eval_strategy='steps' "
                "and `eval_steps`, or leave `rollback_metric` out."
            )
        first = _first_evaluation(args, state, per_epoch)
        if self.reference is None and not args.eval_on_start and (first is None or first >= ahead[0]):
            when = "at a step that is not known beforehand" if first is None else f"after step {first}"
            raise ValueError(
                f"{name} compares with an evaluation before the first reduction, which takes place after step "
                f"{ahead[0]}; found the first evaluation {when}. Set eval_on_start=True, or evaluate more often, or "
                "choose a later `start`."
            )

    def is_reported(self, metrics: dict[str, float], trainer: Trainer | None) -> bool:
        """Whether an evaluation reports the metric; that of one data set out of several, or a user's own, need not.

        Raises:
            KeyError: the evaluation of the Trainer does not.
        """
        if self.metric in metrics:
            return True
        names = [name for name in metrics if name.startswith("eval_")]
        if names and trainer is not None and not isinstance(trainer.eval_dataset, dict):
            raise KeyError(
                f"Expected {self.metric!r}, the `rollback_metric`, in the metrics of the evaluation; found "
                f"{', '.join(names)}. Choose one of them."
            )
        return False

    def prepare(self, step: int, model: nn.Module, optimizer: Optimizer | None, state: TrainerState) -> str:
        """Keep what is about to change; returns why that is impossible, or ""."""
        if self.pending is not None:
            return ""  # the model before the first of them is what an evaluation has seen
        if self.reference is None:
            return f"no evaluation reported {self.metric!r}, to which `rollback_metric` compares"

        def write() -> tuple[str, str]:
            try:
                return self._store.write(step, Snapshot.take(extract_model_from_parallel(model), optimizer)), ""
            except Exception as error:  # whatever it is, the model has not changed
                return "", f"the snapshot to go back to could not be written ({type(error).__name__}: {error})"

        digest, problem = on_main(write)
        if not problem:
            best = [state.best_metric, state.best_global_step, state.best_model_checkpoint]
            self.pending = {"step": step, "digest": digest, "best": best}
        return problem

    def judge(
        self,
        metrics: dict[str, float],
        model: nn.Module,
        optimizer: Optimizer | None,
        state: TrainerState,
        events: list[CompressionEvent],
    ) -> bool:
        """Take note of an evaluation, and go back if that is what it says.

        Args:
            metrics: of the evaluation. After going back they are those of the reference: the Trainer goes on with that
                model, and chooses the best one, steps its scheduler and stops early by these numbers.
            model: not wrapped.
            optimizer: that trains it.
            state: of the Trainer; its record of the best model is that from before the reduction again.
            events: of the report; those that are judged say so.

        Returns:
            Whether the model has gone back.
        """
        pending, self.pending = self.pending, None
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        if pending is None:
            self.reference = numbers
            return False
        before, after = self.reference[self.metric], numbers[self.metric]
        judged = [e for e in events if e.changed and not e.dry_run and (e.step or 0) >= pending["step"]]
        for event in judged:
            event.metric_before, event.metric_after = before, after
        worse, best = on_main(lambda: (self._worse(before, after), self._best(pending)))
        snapshot, problem = self._read(pending) if worse else (None, "")
        if problem:
            logger.warning("Cannot go back to before the reduction at step %d: %s.", pending["step"], problem)
        if snapshot is None:
            self.reference = numbers
            return False
        _go_back(snapshot, model, optimizer)
        for event in judged:
            event.rolled_back_at = state.global_step
        metrics.update({name: value for name, value in self.reference.items() if name in metrics})
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best
        return True

    def finish(self, clean: bool) -> None:
        """The run ends here, judged or not."""
        if self.pending is not None:
            logger.warning(
                "The run ended before an evaluation could judge the reduction at step %d: it stays.",
                self.pending["step"],
            )
        self.pending = None
        if clean:
            self.clean()

    def clean(self) -> None:
        """Delete the snapshots for which neither the present decision nor that of a checkpoint waits."""
        if not self._store.folder.is_dir():
            return
        waiting = [self.pending]
        for checkpoint in checkpoints(self._output_dir):
            with suppress(OSError, ValueError, AttributeError):
                waiting.append((callback_state(checkpoint).get("rollback") or {}).get("pending"))
        self._store.keep_only({pending["step"] for pending in waiting if pending is not None})

    def _read(self, pending: dict[str, Any]) -> tuple[Snapshot | None, str]:
        """The snapshot to go back to, or why it cannot be had; the same on every process.

        Each reads the file, because what one hands out goes through the memory of the devices. Where some cannot, as
        on machines without a common file system, the first hands it out all the same.
        """
        snapshot, problem = None, ""
        try:
            snapshot = self._store.read(pending["step"], pending["digest"])
        except Exception as error:  # whatever it is, the others wait
            problem = str(error)
        return (snapshot, "") if all_ranks(snapshot is not None) else on_main(lambda: (snapshot, problem))

    @staticmethod
    def _best(pending: dict[str, Any]) -> list:
        """The best model before the reduction, if its checkpoint has not made room for later ones."""
        best = pending["best"]
        return best if best[2] is None or Path(best[2]).is_dir() else [None] * 3

    def _worse(self, before: float, after: float) -> bool:
        """By more than the tolerance, relative to the value before; a value that is not finite is."""
        if not math.isfinite(before):
            return False
        loss = before - after if self._greater_is_better else after - before
        return not math.isfinite(after) or loss > self._config.rollback_tolerance * abs(before)


def _go_back(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Put a snapshot back, on every process, within an evaluation."""
    snapshot.put_back(model, optimizer)
    if callable(getattr(optimizer, "eval", None)):  # the snapshot is of training; the Trainer saves what it evaluates
        optimizer.eval()
    torch._dynamo.reset()  # compiled code has the reduced shapes
    for replica in find_replicas(model):
        rebuild_reducer(replica)
        check_replicas_equal(model, Ranks(replica.process_group))


def steps_per_epoch(args: TrainingArguments, dataloader: DataLoader | None) -> int | None:
    """Optimizer steps of one epoch; None if the data do not tell."""
    return math.ceil(len(dataloader) / args.gradient_accumulation_steps) if has_length(dataloader) else None


def _first_evaluation(args: TrainingArguments, state: TrainerState, per_epoch: int | None) -> int | None:
    """The step after which the Trainer evaluates next; None if that is not known."""
    if args.eval_strategy == IntervalStrategy.STEPS:
        every, delay = int(state.eval_steps), args.eval_delay
    elif per_epoch is None:
        return None
    else:
        every, delay = per_epoch, args.eval_delay * per_epoch
    return every * max(state.global_step // every + 1, math.ceil(delay / every))
