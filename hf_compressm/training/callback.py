"""Compression during a run of the stock `transformers.Trainer`."""

import gc
import logging
import math
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compression import (
    adopt_new_parameters,
    check_support,
    compress_once,
    observe,
    resolve_config,
    sync_config,
)
from ..config import CompressionConfig
from ..reducers import allow_other_sizes
from ..report import CompressionEvent, CompressionReport
from ..surgery import UnsupportedSetupError, drop_stale_state, find_replicas, rebuild_reducer
from .calibration import Calibration

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
    a model from before the last reduction.

    Each event is one line in the log and one entry for the loggers of the Trainer (`compressm/...`);
    `compression_report.json` is written to the output directory and to each checkpoint.

    Args:
        config: the options; or give them by name.
        **options: fields of `CompressionConfig`, instead of `config`.

    Raises:
        ValueError: from the constructor, for an option outside its range; at the start of training, for a model, an
            optimizer, a schedule or a set-up that cannot be served. No step has been taken then.
    """

    def __init__(self, config: CompressionConfig | None = None, **options):
        self.config = resolve_config(config, options)
        self.report = CompressionReport(self.config.to_dict())
        self._events: list[int] = []
        self._calibration: Calibration | None = None
        self._adoption: RemovableHandle | None = None
        self._output_dir = self._resumed_dir = ""
        self._trainer: weakref.ref[Trainer] | None = None

    def state(self) -> dict:
        """What a checkpoint holds of this callback."""
        attributes = {"report": self.report.to_dict(), "output_dir": self._output_dir}
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
        **kwargs,
    ):
        if self._calibration is not None:
            self._calibration.stop()  # of a run that ended with an exception
        if self._adoption is not None:
            self._adoption.remove()
        self._find_trainer(state)
        self._check_arguments(args)
        self._check_resumed_optimizer(model, optimizer)
        check_support(model, self.config, optimizer, resumed=state.global_step > 0)
        sync_config(model)
        self._events = self.config.events(state.max_steps)
        self._restore(state)
        self._calibration = self._begin_calibration(model)
        if self._in_window(args, state.global_step):
            self._calibration.start()
            self._calibration.resume(args, state, [args.output_dir, self._resumed_dir])
        self._output_dir = str(Path(args.output_dir).resolve())
        if state.is_world_process_zero:
            steps = ", ".join(map(str, self._events))
            logger.info("reductions (%s=%s) after step %s of %d", *self.config.rule, steps, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._in_window(args, state.global_step):
            self._calibration.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        if state.global_step not in self._events:
            return
        remaining = sum(event >= state.global_step for event in self._events)
        self._calibration.stop()
        observation, loss = self._calibration.observation, self._calibration.loss(model)
        event = compress_once(model, self.config, optimizer, observation, loss, state.global_step, remaining)
        self._calibration = self._begin_calibration(model)
        self.report.events.append(event)
        if event.changed and not event.dry_run:
            # models from before and after a reduction are not to be compared
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._log(event, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            self.report.save(checkpoint)
        if self._calibration is not None and checkpoint.is_dir():
            self._calibration.save(args, checkpoint)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        if self._calibration is not None:
            self._calibration.stop()
        sync_config(model)
        # load_best_model_at_end may just have brought back other sizes
        if drop_stale_state(optimizer):
            for replica in find_replicas(model):
                rebuild_reducer(replica)
            torch._dynamo.reset()
        if state.is_world_process_zero:
            self.report.save(Path(args.output_dir))

    def _prepare_for_checkpoints(self, model: nn.Module | None) -> None:
        """Let checkpoints with other sizes come in: they are loaded before training begins."""
        if model is not None:
            allow_other_sizes(model)
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            return
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
        trainer = self._trainer() if self._trainer is not None else None
        by_loss = self.config.rule[0] == "max_loss_increase"
        if by_loss and trainer is None:
            raise ValueError(
                "max_loss_increase measures the loss as the Trainer computes it, and no Trainer was found whose state "
                "this callback was given. Choose another rank rule."
            )
        return Calibration(observe(model, self.config), trainer if by_loss else None, self.config.calibration_batches)

    def _restore(self, state: TrainerState) -> None:
        """Take over the report of the checkpoint that the run resumes from; a new run starts a new one."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name)
        if state.global_step > 0 and isinstance(saved, dict):
            self.report = CompressionReport.from_dict(saved["attributes"]["report"])
            self._resumed_dir = saved["attributes"]["output_dir"]
        else:
            self.report = CompressionReport(self.config.to_dict())
        # the Trainer expects an entry when it saves, also if the checkpoint was written without this callback
        state.stateful_callbacks.setdefault(name, self.state())

    def _log(self, event: CompressionEvent, state: TrainerState, control: TrainerControl) -> None:
        if state.is_world_process_zero:
            logger.info("%s", event)
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            logger.warning("The Trainer was not found: its loggers will not show the reductions.")
            return
        flags = control.should_log, control.should_evaluate, control.should_save
        trainer.log(event.summary())
        control.should_log, control.should_evaluate, control.should_save = flags  # log() clears should_log

    def _find_trainer(self, state: TrainerState) -> None:
        """The Trainer does not hand itself to callbacks; it is the one whose state this is."""
        trainers = (obj for obj in gc.get_objects() if issubclass(type(obj), Trainer))
        found = next((trainer for trainer in trainers if trainer.state is state), None)
        self._trainer = weakref.ref(found) if found is not None else None

    @staticmethod
    def _check_arguments(args: TrainingArguments) -> None:
        if args.n_gpu > 1:
            raise UnsupportedSetupError(
                f"One process sees {args.n_gpu} GPUs, so that the Trainer uses torch.nn.DataParallel, which is not "
                "supported. Launch with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
