"""What the examples share: the model's options, the command line, and the clock."""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    HfArgumentParser,
    PreTrainedConfig,
    TrainerCallback,
    TrainingArguments,
)

from hf_compressm import CompressionConfig

MODEL_TYPES = ["mimo_ssm", "mamba", "mamba2", "reducible_mamba", "reducible_mamba2"]
STOCK_TYPES = ["mamba", "mamba2"]  # one state size for all layers
HEAD_DIM = 32  # of Mamba-2


@dataclass
class ModelArguments:
    """The model to train, and whether to compress it."""

    model_type: str = field(default="mimo_ssm", metadata={"help": "Architecture.", "choices": MODEL_TYPES})
    hidden_size: int = field(default=128, metadata={"help": "Width of the residual stream."})
    state_size: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "States of a layer: one number for all, or one per layer."}
    )
    num_hidden_layers: int = field(default=2, metadata={"help": "Number of layers."})
    config_overrides: str = field(
        default="{}", metadata={"help": """Other fields of the model's config, as JSON: '{"r_min": 0.9}'."""}
    )
    do_compress: bool = field(default=True, metadata={"help": "Reduce the state size during training."})

    def config(self, **fields: Any) -> PreTrainedConfig:
        """The config of the model.

        Args:
            fields: what the task decides, such as the size of the vocabulary.

        Raises:
            ValueError: not one size per layer, `config_overrides` is not a JSON object, or the config refuses a value.
        """
        overrides = json.loads(self.config_overrides)
        if not isinstance(overrides, dict):
            raise ValueError(f"--config_overrides is a JSON object; found {self.config_overrides}")
        if unknown := [name for name in overrides if not hasattr(CONFIG_MAPPING[self.model_type], name)]:
            raise ValueError(f"a {self.model_type} config has no field {' and no '.join(unknown)}")
        if len(self.state_size) == 1:
            fields["state_size"] = self.state_size[0]
        elif self.model_type in STOCK_TYPES:
            raise ValueError(f"--state_size takes one number for all layers of a stock {self.model_type} model")
        elif len(self.state_size) == self.num_hidden_layers:
            fields["per_layer_config"] = {i: {"state_size": n} for i, n in enumerate(self.state_size)}
        else:
            raise ValueError(
                f"--state_size takes one number, or one for each of the {self.num_hidden_layers} layers; "
                f"found {len(self.state_size)}."
            )
        sizes = {"hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers}
        if self.model_type.endswith("mamba2"):  # whose heads have to fill the inner width
            sizes |= {"head_dim": HEAD_DIM, "num_heads": 2 * self.hidden_size // HEAD_DIM, "n_groups": 1}
        try:
            return AutoConfig.for_model(self.model_type, **sizes | fields | overrides)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error


@dataclass
class CompressionArguments(CompressionConfig):
    """`CompressionConfig` on a command line, where `--seed` and `--greater_is_better` are those of the whole run."""

    greater_is_better: bool | None = field(default=None, init=False)
    seed: int = field(default=0, init=False)


def parse_arguments(
    data_class: type,
    description: str,
    defaults: dict[str, Any],
    args: list[str] | None,
    training_class: type = TrainingArguments,
) -> tuple:
    """Read the command line into the model's, the data's, the compression's and the loop's arguments.

    Args:
        data_class: the dataclass of the data's arguments.
        description: of the example, for ``--help``.
        defaults: that differ from the dataclasses'.
        args: the command line; None for the process's own.
        training_class: the dataclass of the loop's arguments, `seed` among them.

    Returns:
        ``(model, data, compression, training)`` arguments.
    """
    parser = HfArgumentParser(
        (ModelArguments, data_class, CompressionArguments, training_class),
        description=description,
        usage="%(prog)s [--option value ...]",
    )
    parser.set_defaults(**defaults)
    try:
        model, data, compression, training = parser.parse_args_into_dataclasses(args)
    except ValueError as error:
        fail(error)
    compression.seed = training.seed
    if getattr(training, "metric_for_best_model", None) in (None, compression.rollback_metric):
        compression.greater_is_better = getattr(training, "greater_is_better", None)
    if str(getattr(training, "resume_from_checkpoint", None)).lower() == "true":
        training.resume_from_checkpoint = True  # the last whole checkpoint, rather than a folder of that name
    return model, data, compression, training


def fail(error: object) -> None:
    """End the process with one line that says why."""
    sys.exit(f"error: {error}")


class StepTimer(TrainerCallback):
    """Seconds of every training step: forward, backward and optimizer, without data loading and evaluation.

    Put it before `CompreSSMCallback` in the list of callbacks, so that the reductions are not counted either.
    """

    def __init__(self):
        self.seconds: dict[int, float] = {}
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = _now()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self.seconds[state.global_step] = _now() - self._start

    def median_ms(self, steps: Iterable[int]) -> float | None:
        """Median milliseconds of those of `steps` that were taken; None if none was."""
        taken = [self.seconds[step] for step in steps if step in self.seconds]
        return 1e3 * median(taken) if taken else None


class EvaluateAroundReductions(TrainerCallback):
    """Evaluate one step before the first reduction and right after the last."""

    def __init__(self, compression: CompressionConfig):
        self.compression = compression
        self.before = self.after = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Look up the schedule."""
        events = self.compression.events(state.max_steps)
        self.before, self.after = events[0] - 1, events[-1]

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation."""
        if state.global_step in (self.before, self.after):
            control.should_evaluate = True


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def state_sizes(config: PreTrainedConfig) -> list[int]:
    """State size of every layer."""
    return [layer.state_size for layer in config.per_layer_config]
