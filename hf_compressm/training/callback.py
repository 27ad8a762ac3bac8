"""Compression during a run of the stock `transformers.Trainer`."""

import gc
import logging
import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis import check_whole
from ..compression import (
    Sizes,
    adopt_new_parameters,
    check_support,
    compress_once,
    observe,
    resolve_config,
    sync_config,
)
from ..config import CompressionConfig
from ..reducers import allow_other_sizes
from ..report import CompressionReport
from ..surgery import (
    UnsupportedSetupError,
    drop_stale_state,
    find_replicas,
    rebuild_reducer,
)
from .calibration import Calibration
from .checkpoint import Replacement, ResumingTrain, is_checkpoint, local_processes
from .dry_run import DryRun
from .publishing import Publishing
from .rollback import Rollback, steps_per_epoch
from .run_record import RunRecord

logger = logging.getLogger(__name__)


class CompreSSMCallback(TrainerCallback, ExportableState):
    """Shrinks the state of a state space model while the stock `Trainer` trains it.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[CompreSSMCallback(tolerance=0.05)])
    ```

    The reductions take place after the optimizer steps that `CompressionConfig.events` names, by default four in the
    first tenth of the run. The schedule is a function of the global step alone: a resumed run goes on where it was.
    Layers whose Gramians depend on the input are observed in the forward passes of the last training steps before an
    event, `calibration_batches` micro-batches per process; `max_loss_increase` measures the loss on the same batches.

    At each reduction the record of the best checkpoint is cleared, so that `load_best_model_at_end` never brings back
    a model from before the last reduction. With `rollback_metric` the next evaluation judges a reduction: if it cost
    too much, the whole model and the optimizer's state go back in place to what they were before it, and no other
    reduction follows. The step count, the learning rate and the order of the data go on.

    With ``resume_from_checkpoint=True`` incomplete checkpoints are stepped over.

    Each event is one line in the log and one entry for the loggers of the Trainer (`compressm/...`);
    `compression_report.json` is written to the output directory and to each checkpoint. With `dry_run=True` each event
    prints what several tolerances would keep and gain, and changes nothing.

    Pushes to the Hub carry the report, a figure, a model card made of them and, for the architectures of this package,
    the code for `trust_remote_code`.

    Args:
        config: the options; or give them by name.
        **options: fields of `CompressionConfig`, instead of `config`.

    Raises:
        ValueError: from the constructor, for an option outside its range; at the start of training, for a model, an
            optimizer, a schedule or a set-up that cannot be served. No step has been taken then.

    Example:

    ```python
    >>> from hf_compressm import CompreSSMCallback

    >>> callback = CompreSSMCallback(tolerance=0.02, end=0.2)
    >>> callback.config.rule
    ('tolerance', 0.02)

    ```
    """

    def __init__(self, config: CompressionConfig | None = None, **options):
        self.config = resolve_config(config, options)
        self.report = CompressionReport(self.config.to_dict())
        self._events: list[int] = []
        self._calibration: Calibration | None = None
        self._rollback: Rollback | None = None
        self._sizes: Sizes | None = None
        self._adoption: RemovableHandle | None = None
        self._replaced: list[Replacement] = []
        self._record: RunRecord | None = None
        self._publishing: Publishing | None = None
        self._dry_run = DryRun()
        self._scheduled = self._stepped = self._calibrated = False
        self._max_steps, self._output_dir = 0, ""
        self._open_events: int | None = None  # None outside the evaluations of the Trainer's schedule
        self._trainer_ref: weakref.ref[Trainer] | None = None

    def state(self) -> dict:
        """What a checkpoint holds of this callback."""
        attributes = {
            "report": self.report.to_dict(),
            "output_dir": self._output_dir,
            "max_steps": self._max_steps,
            "processes": local_processes(),
            "calibrated": self._calibrated,
            "rollback": None if self._rollback is None else self._rollback.state(),
        }
        return {"args": self.config.to_dict(), "attributes": attributes}

    @classmethod
    def from_state(cls, state: dict) -> "CompreSSMCallback":
        """The callback that a checkpoint holds."""
        callback = cls(**state["args"])
        callback.report = CompressionReport.from_dict(state["attributes"]["report"])
        return callback

    def on_init_end(self, args, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs):
        self._find_trainer(state)
        self._prepare_for_checkpoints(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        train_dataloader=None,
        **kwargs,
    ):
        self._stop()  # a run that ended with an exception
        if self._adoption is not None:
            self._adoption.remove()
        self._find_trainer(state)
        self._check_arguments(args)
        self._check_resumed_optimizer(model, optimizer)
        check_support(model, self.config, optimizer, resumed=state.global_step > 0)
        if self.config.dry_run:
            check_whole(model)
        allow_other_sizes(model)
        sync_config(model)
        trainer = self._trainer
        trial = getattr(trainer, "_trial", None)  # of a search: each has a directory of its own
        directory = args.output_dir if trainer is None else trainer._get_output_dir(trial)
        self._output_dir = str(Path(directory).resolve())
        self._events, self._max_steps = self.config.events(state.max_steps), state.max_steps
        self._restore(args, state, model, steps_per_epoch(args, train_dataloader))
        self._sizes = Sizes(model)
        if trainer is not None:
            self._replaced.append(Replacement(trainer, "save_model", self._with_own_files))
            self._replaced.append(Replacement(trainer, "_evaluate", self._noting_schedule))
        self._record = RunRecord(self.report.run, self.config.events(state.max_steps))
        self._record.describe(args, model, trainer)
        self._publishing = None if self.config.dry_run else Publishing(trainer, model, self.report, state)
        self._stepped = False
        if state.is_world_process_zero:
            steps = ", ".join(map(str, self._events)) or "none"
            logger.info("reductions (%s=%s) after step %s of %d", *self.config.rule, steps, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        self._stepped = True
        observed = self._in_window(args, state.global_step)
        if observed:
            self._calibration.start()
        if self.config.dry_run and state.global_step + 1 in self._events:
            self._dry_run.watch(model)
        self._record.step_begins(state.global_step + 1, observed and self._calibration.observation.needed)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        step = state.global_step
        self._record.step_ends()
        if step not in self._events:
            return
        remaining = sum(event >= step for event in self._events)
        self._calibration.stop()
        observation, loss = self._calibration.observation, self._calibration.loss(model)
        if self.config.dry_run:
            table = self._dry_run.analyze(model, self.config, observation)
            if state.is_world_process_zero:
                logger.info("step %d:\n%s", step, table)
        keep = None
        if self._rollback is not None:
            keep = partial(self._rollback.prepare, step, model, optimizer, state)
        event = compress_once(model, self.config, optimizer, observation, loss, step, remaining, keep)
        self._calibration = self._begin_calibration(model)
        self._sizes = Sizes(model)
        self._record.count(model)
        self.report.events.append(event)
        if event.changed and not event.dry_run:
            # models from before and after a reduction are not to be compared
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            if self._resuming is not None:
                self._resuming.reduced = True
        self._log(event, event.summary(), state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics=None,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        own = self._scheduled and self._open_events == 1
        if self._rollback is None or not own or not self._rollback.is_reported(metrics, self._trainer):
            return
        self._scheduled = False  # `evaluate` of a subclass may evaluate more than once: the first decides
        if not self._stepped and state.global_step > 0 and self._rollback.reference is not None:
            return  # eval_on_start of a resumed run, which the uninterrupted one does not have
        decides = self._rollback.pending is not None
        if self._rollback.judge(metrics, model, optimizer, state, self.report.events):
            self._events = []
            self._calibration.stop()
            self._calibration = self._begin_calibration(model)
            self._sizes = Sizes(model)
            self._log(self.report.rollback_line(), self.report.rollback_summary(), state, control)
        if decides and state.is_world_process_zero:
            self._rollback.clean()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._publishing is not None:
            self._publishing.on_push_begin(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not self._replaced and checkpoint.is_dir():
            self._write(args, checkpoint)
        if self._rollback is not None and state.is_world_process_zero:
            self._rollback.clean()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        self._stop()
        # load_best_model_at_end may just have brought back other sizes, with other parameters
        if self._sizes.follow(model, optimizer) or args.load_best_model_at_end:
            for replica in find_replicas(model):
                rebuild_reducer(replica)
            torch._dynamo.reset()
        if self._rollback is not None:
            self._rollback.finish(state.is_world_process_zero)
        self._record.count(model)
        self._record.finish()
        self._record.end(args, state)
        if state.is_world_process_zero:
            self.report.save(Path(self._output_dir))

    def _stop(self) -> None:
        """Leave the Trainer and the model as they were found."""
        self._dry_run.stop()
        if self._calibration is not None:
            self._calibration.stop()
        while self._replaced:
            self._replaced.pop().undo()

    @property
    def _trainer(self) -> Trainer | None:
        return self._trainer_ref() if self._trainer_ref is not None else None

    @property
    def _resuming(self) -> ResumingTrain | None:
        """The Trainer's `train`, if this callback was there when the Trainer was made."""
        train = getattr(self._trainer, "train", None)
        return train if isinstance(train, ResumingTrain) else None

    def _prepare_for_checkpoints(self, model: nn.Module | None) -> None:
        """Let checkpoints with other sizes come in: they are loaded before training begins."""
        if model is not None:
            allow_other_sizes(model)
        trainer = self._trainer
        if trainer is None:
            return
        if self._resuming is None:
            trainer.train = ResumingTrain(trainer, _stop_all)
        if trainer.model_init is not None:  # each run makes its model anew
            make_model = trainer.call_model_init

            def call_model_init(trial=None) -> nn.Module:
                made = make_model(trial)
                allow_other_sizes(made)
                return made

            trainer.call_model_init = call_model_init
        if model is not None and trainer.optimizer is not None:  # made before a checkpoint brings new parameters
            optimizer = trainer.optimizer
            self._adoption = model.register_load_state_dict_post_hook(
                lambda loaded, _: adopt_new_parameters(loaded, optimizer)
            )

    @staticmethod
    def _check_resumed_optimizer(model: nn.Module, optimizer: Optimizer | None) -> None:
        """Parameters that came with a checkpoint are trained; state that does not fit its parameter is an error."""
        adopt_new_parameters(model, optimizer)
        if count := drop_stale_state(optimizer):
            raise ValueError(
                f"The optimizer state of {count} parameters has other shapes than the parameters: the checkpoint was "
                "written with another order of parameters, or with weights of other sizes. Resume with the model and "
                "the optimizer groups of the original run, or from weights alone (`save_only_model`)."
            )

    def _in_window(self, args: TrainingArguments, steps_done: int) -> bool:
        """Whether the next step is one of the last before an event, whose micro-batches calibrate it."""
        steps = math.ceil(self.config.calibration_batches / args.gradient_accumulation_steps)
        return any(event - steps <= steps_done < event for event in self._events)

    def _begin_calibration(self, model) -> Calibration:
        by_loss = self.config.rule[0] == "max_loss_increase"
        if by_loss and self._trainer is None:
            raise ValueError(
                "max_loss_increase measures the loss as the Trainer computes it, and no Trainer was found whose state "
                "this callback was given. Choose another rank rule."
            )
        trainer = self._trainer if by_loss else None
        return Calibration(observe(model, self.config), trainer, self.config.calibration_batches)

    def _restore(self, args: TrainingArguments, state: TrainerState, model, per_epoch: int | None) -> None:
        """Take over what the checkpoint that the run resumes from holds; a new run starts afresh."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        self.report = CompressionReport(self.config.to_dict())
        self._rollback = Rollback(self.config, self._output_dir) if self.config.rollback_metric else None
        former = saved["attributes"] if state.global_step > 0 and isinstance(saved, dict) else {}
        checkpoints = self._resumed_checkpoints(state, former.get("output_dir", ""))
        if former:
            self.report = CompressionReport.from_dict(former["report"])
            if self.report.taken_back:
                self._events = []
            self._warn_of_changes(saved["args"], former.get("max_steps"), state)
        if self._rollback is not None:
            if former.get("rollback") is not None:
                directories = [*(checkpoint.parent for checkpoint in checkpoints), Path(former["output_dir"])]
                self._rollback.resume(former["rollback"], directories)
            self._rollback.check_run(args, state, model, self._events, per_epoch)
        self._calibration = self._begin_calibration(model)
        if self._in_window(args, state.global_step):
            self._calibration.start()
            self._calibration.resume(args, checkpoints)
        # the Trainer expects an entry when it saves, also if the checkpoint was written without this callback
        state.stateful_callbacks.setdefault(name, self.state())

    def _resumed_checkpoints(self, state: TrainerState, former_dir: str) -> list[Path]:
        """Where the checkpoint that the run resumes from may be; none for a new run."""
        if state.global_step == 0:
            return []
        if self._resuming is not None and self._resuming.checkpoint is not None:
            return [self._resuming.checkpoint]
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        return [Path(directory) / name for directory in (self._output_dir, former_dir) if directory]

    def _warn_of_changes(self, options: dict, max_steps: int | None, state: TrainerState) -> None:
        """Say so if the checkpoint was written with other options, or in a run of another length."""
        old, new = options | {"max_steps": max_steps}, self.config.to_dict() | {"max_steps": state.max_steps}
        changed = [f"{key}={old.get(key)!r} then, {new[key]!r} now" for key in new if old.get(key) != new[key]]
        if changed:
            logger.warning(
                "The checkpoint was written with other options (%s). Reductions have taken place after step %s; from "
                "here on they take place after step %s. To keep a former schedule, give `start` and `end` as steps.",
                "; ".join(changed),
                ", ".join(str(event.step) for event in self.report.events) or "none",
                ", ".join(str(event) for event in self._events if event > state.global_step) or "none",
            )

    def _with_own_files(self, save_model: Callable) -> Callable:
        """`Trainer.save_model` that adds what a resume needs: before `trainer_state.json`, which makes a checkpoint
        whole."""

        def save(output_dir=None, *args, **kwargs):
            save_model(output_dir, *args, **kwargs)
            if output_dir is not None and is_checkpoint(Path(output_dir)):
                self._write(self._trainer.args, Path(output_dir))

        return save

    def _noting_schedule(self, evaluate: Callable) -> Callable:
        """The evaluations of the Trainer's own schedule, which alone judge a reduction."""

        def scheduled(*args, **kwargs):
            if self._open_events is not None:  # a callback asks for another one within it
                return evaluate(*args, **kwargs)
            self._scheduled, self._open_events = True, 0
            counting = Replacement(self._trainer.callback_handler, "call_event", self._counting_events)
            try:
                return evaluate(*args, **kwargs)
            finally:
                counting.undo()
                self._scheduled, self._open_events = False, None

        return scheduled

    def _counting_events(self, call_event: Callable) -> Callable:
        """How deep the events are nested: what takes place within another event is a callback's own doing."""

        def counted(*args, **kwargs):
            self._open_events += 1
            try:
                return call_event(*args, **kwargs)
            finally:
                self._open_events -= 1

        return counted

    def _write(self, args: TrainingArguments, checkpoint: Path) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)  # the first process may not have come so far
        self._calibrated = self._calibration.save(args, checkpoint)
        if args.process_index == 0:
            self._record.finish()
            self.report.save(checkpoint)

    def _log(self, line: object, numbers: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        if state.is_world_process_zero:
            logger.info("%s", line)
        if self._trainer is None:
            logger.warning("The Trainer was not found: its loggers will not show the reductions.")
            return
        flags = control.should_log, control.should_evaluate, control.should_save
        self._trainer.log(numbers)
        control.should_log, control.should_evaluate, control.should_save = flags  # log() clears should_log

    def _find_trainer(self, state: TrainerState) -> None:
        """The Trainer does not hand itself to callbacks; it is the one whose state this is."""
        trainers = (obj for obj in gc.get_objects() if issubclass(type(obj), Trainer))
        found = next((trainer for trainer in trainers if trainer.state is state), None)
        self._trainer_ref = weakref.ref(found) if found is not None else None

    def _check_arguments(self, args: TrainingArguments) -> None:
        if args.n_gpu > 1:
            raise UnsupportedSetupError(
                f"One process sees {args.n_gpu} GPUs, so that the Trainer uses torch.nn.DataParallel, which is not "
                "supported. Launch with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        plugin = None if self._trainer is None else getattr(self._trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and "FULL" not in str(plugin.state_dict_type):
            raise UnsupportedSetupError(
                "A run under FSDP resumes at a reduced size from whole checkpoints, which hold the config of that "
                f"size; found {plugin.state_dict_type}. Set `state_dict_type: FULL_STATE_DICT`."
            )
        if args.auto_find_batch_size and self._resuming is not None and self._resuming.reduced:
            raise UnsupportedSetupError(
                "auto_find_batch_size begins the run again with a smaller batch, but the model has been reduced "
                "already. Make the model anew, and set per_device_train_batch_size to what fits."
            )


def _stop_all(trainer: Trainer) -> None:
    """Stop the callbacks that a Trainer has now: those restored from a checkpoint are other objects."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, CompreSSMCallback):
            callback._stop()
