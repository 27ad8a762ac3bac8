"""The command line: `hf-compressm analyze | reduce | plot | card | export`."""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from inspect import getdoc
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging

from .analysis import TOLERANCES, analyze
from .calibration_data import DataArguments, calibration_batches, check_fit
from .compression import observe
from .config import CompressionConfig
from .hub import PLOT_NAME, Run, bundle_remote_code, to_stock, write_card
from .observation import first_batches, model_loss
from .training import reduce_checkpoint

logger = logging.getLogger(__name__)

_DESCRIPTION = "Make the state of a state space model (MIMO SSM, Mamba, Mamba-2) smaller, and show what was done."
_EPILOG = """examples:
  hf-compressm analyze outputs/demo --data train.txt
  hf-compressm reduce outputs/demo outputs/small --data train.txt --max_loss_increase 0.01
  hf-compressm plot outputs/small
  hf-compressm export outputs/small outputs/stock

`hf-compressm COMMAND --help` tells the options of a command. A MODEL is a directory or a name on the Hub.
Exit codes: 0 done; 1 an error, in one line on stderr; 2 a command line that cannot be understood."""


@dataclass
class ReductionArguments(CompressionConfig):
    """`CompressionConfig` for one pass outside training, without the options of a schedule."""

    start: float = field(default=0.0, init=False)
    end: float = field(default=0.1, init=False)
    num_reductions: int = field(default=4, init=False)
    rollback_metric: str | None = field(default=None, init=False)
    rollback_tolerance: float = field(default=0.02, init=False)
    greater_is_better: bool | None = field(default=None, init=False)
    dry_run: bool = field(default=False, init=False)


@dataclass
class AnalysisArguments(ReductionArguments):
    """The same for a comparison of tolerances, in which no optimizer takes part."""

    moments: str = field(default="carry", init=False)


@dataclass
class CardArguments:
    """What the files of a run do not tell."""

    model_name: str | None = field(default=None, metadata={"help": "Name of the model. Default: of the directory."})
    license: str | None = field(default=None, metadata={"help": "Its license, as the Hub names it: apache-2.0, mit."})
    language: list[str] | None = field(default=None, metadata={"help": "Language codes of its data: en."})
    dataset: str | None = field(default=None, metadata={"help": "Name of the data, for people."})
    dataset_tags: str | None = field(default=None, metadata={"help": "Name of the data set on the Hub."})
    dataset_args: str | None = field(default=None, metadata={"help": "Its configuration."})
    tasks: str | None = field(default=None, metadata={"help": "Task, as the Hub names it: text-generation."})
    tags: list[str] | None = field(default=None, metadata={"help": "More tags."})
    finetuned_from: str | None = field(default=None, metadata={"help": "The model that it was fine-tuned from."})
    evaluation_command: str | None = field(default=None, metadata={"help": "Command that measured the results."})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the name of the program; None for those of the process.

    Returns:
        The exit code: 0, or 1 after an error that was told in one line on stderr.
    """
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["hf-compressm", *arguments])
    if not options.debug:
        transformers_logging.set_verbosity_error()
        datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except (ValueError, ArithmeticError, OSError, ImportError, HfHubHTTPError, RuntimeError) as error:
        if options.debug:
            raise
        return _failed(" ".join(str(error).split()) or type(error).__name__)
    return 0


def _failed(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-compressm", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=HfArgumentParser)
    model = {"metavar": "MODEL", "help": "directory, or name on the Hub"}
    output_dir = {"metavar": "OUTPUT_DIR", "help": "directory to write to; must be empty or new"}
    run_dir = {"metavar": "RUN_DIR", "help": "output directory of a run, or one of its checkpoints"}

    command = _command(commands, _analyze, [AnalysisArguments, DataArguments])
    command.add_argument("model", **model)
    command.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES), help="to be compared")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")

    command = _command(commands, _reduce, [ReductionArguments, DataArguments])
    command.add_argument("model", **model)
    command.add_argument("output_dir", **output_dir)

    command = _command(commands, _plot, [])
    command.add_argument("run_dir", **run_dir)
    command.add_argument("--output", help=f"file to write, .png, .pdf or .svg; default: RUN_DIR/{PLOT_NAME}")

    command = _command(commands, _card, [CardArguments])
    command.add_argument("run_dir", **run_dir)

    command = _command(commands, _export, [])
    command.add_argument("model", **model)
    command.add_argument("output_dir", **output_dir)
    command.add_argument("--to", choices=["stock", "remote_code"], default="stock", help="default: stock")
    return parser


def _command(commands: Any, run: Callable, dataclasses: list[type]) -> HfArgumentParser:
    """A subcommand named like the function that runs it, whose docstring is its help."""
    name, text = run.__name__.removeprefix("_"), getdoc(run)
    summary, _, description = text.partition("\n\n")
    description, _, examples = description.partition("examples:")
    parser = commands.add_parser(
        name,
        dataclass_types=dataclasses,
        help=f"{summary[0].lower()}{summary[1:].rstrip('.')}",
        description=f"{summary}\n\n{description.rstrip()}",
        epilog=f"examples:{examples}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and all warnings")
    parser.set_defaults(run=run)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _dataclass(cls: type, options: argparse.Namespace) -> Any:
    """The options of one dataclass, out of all."""
    return cls(**{f.name: getattr(options, f.name) for f in fields(cls) if f.init})


def _config_and_data(cls: type[CompressionConfig], options: argparse.Namespace):
    return CompressionConfig(**_dataclass(cls, options).to_dict()), _dataclass(DataArguments, options)


def _analyze(options: argparse.Namespace) -> None:
    """Show what reductions of several strengths would keep, cost and gain; nothing is changed.

    For each layer: the states that each tolerance keeps, the bound of its error where there is one, the relative error
    of its output, the part of the Hankel singular values discarded. For the model: parameters, and with --data the
    time and the memory of a training step at these sizes, measured here. Models whose reduction depends on their input
    (Mamba) need --data, and so does --max_loss_increase.

    examples:
      hf-compressm analyze outputs/demo                            a MIMO SSM needs no data
      hf-compressm analyze outputs/demo --data train.txt           with them its training step is measured, too
      hf-compressm analyze me/my-mamba --data train.txt --tolerances 0.01 0.02 --json
    """
    config, data = _config_and_data(AnalysisArguments, options)
    wrong = [tolerance for tolerance in options.tolerances if not 0 < tolerance < 1]
    if wrong:
        raise ValueError(f"--tolerances are fractions in the open interval (0, 1); found {wrong}.")
    model = _load(options.model)
    batches, _ = _batches(options.model, data, config, model)
    found = analyze(model, batches, options.tolerances, config)
    print(json.dumps(found.to_dict()) if options.json else found)


def _reduce(options: argparse.Namespace) -> None:
    """Write a smaller copy of a finished model or of a checkpoint.

    One rank rule decides how small: --tolerance (the default, 0.05), --max_loss_increase, --target_state_size or
    --reduction_fraction. Layers that cannot be reduced stay as they are, with a line that says why.

    examples:
      hf-compressm reduce outputs/demo outputs/small --tolerance 0.02
      hf-compressm reduce outputs/demo outputs/small --data train.txt --max_loss_increase 0.01
      hf-compressm reduce me/my-mamba small-mamba --data train.txt --target_state_size 8
    """
    config, data = _config_and_data(ReductionArguments, options)
    output_dir = _new_directory(options.output_dir)
    source = _local(options.model)
    model = _load(source)
    batches, held_out = _batches(source, data, config, model)
    before = _loss(model, held_out)
    report = reduce_checkpoint(source, output_dir, config, batches)
    print(report)
    record = report.run
    if before is not None:
        after, what = _loss(_load(output_dir), held_out), data.describe(held_out)
        print(f"loss on {what}, held out from the reduction: {before:.4f} before, {after:.4f} after")
        record["loss"] = {"before": before, "after": after, "data": what}
    if data.data is not None:
        record["calibration_data"] = Path(data.data).name if Path(data.data).is_file() else data.data
    record["command"] = "\n".join(filter(None, [record.get("command"), options.command]))
    report.save(output_dir)
    if Run.load(output_dir).changed_events:
        details = {} if Path(options.model).is_dir() else {"finetuned_from": options.model}
        write_card(output_dir, **details)
    print(f"saved to {output_dir}")


def _plot(options: argparse.Namespace) -> None:
    """Draw state sizes, loss and Hankel singular values of a run.

    From compression_report.json and trainer_state.json: the state sizes over the steps, the loss with the reductions
    marked, and the Hankel singular values of the layers before each reduction.

    examples:
      hf-compressm plot outputs/demo
      hf-compressm plot outputs/demo --output figure.pdf
    """
    run = Run.load(options.run_dir)
    path = Path(options.output or Path(options.run_dir) / PLOT_NAME)
    run.report.plot(path, run.log_history)
    print(f"saved to {path}")


def _card(options: argparse.Namespace) -> None:
    """Write the model card of a run.

    README.md and its figure, from compression_report.json, trainer_state.json, config.json and the weights. For the
    architectures of this package the modeling code is put beside it, for trust_remote_code.

    examples:
      hf-compressm card outputs/demo --dataset tinyshakespeare --license mit --language en
    """
    details = {name: value for name, value in vars(_dataclass(CardArguments, options)).items() if value is not None}
    for path in write_card(options.run_dir, **details):
        print(f"saved to {path}")


def _export(options: argparse.Namespace) -> None:
    """Write a checkpoint for people who do not have this package.

    `--to stock`: a reducible Mamba or Mamba-2 model as the ordinary one of transformers; its layers must have one
    size. `--to remote_code`: any model of this package with its code beside it, for trust_remote_code.

    examples:
      hf-compressm export outputs/small outputs/stock
      hf-compressm export outputs/demo outputs/demo-for-all --to remote_code
    """
    output_dir = _new_directory(options.output_dir)
    model = _load(options.model)
    if options.to == "stock":
        model = to_stock(model)
    model.save_pretrained(output_dir)
    if options.to == "remote_code" and not bundle_remote_code(output_dir):
        raise ValueError(f"a {model.config.model_type} model needs no code: transformers loads it as it is.")
    _save_tokenizer(options.model, output_dir)
    print(f"saved {type(model).__name__} to {output_dir}")


def _load(name: str) -> PreTrainedModel:
    """A model from a directory or the Hub, of the class that was saved."""
    config = _config(name)
    architecture = (config.architectures or [""])[0]
    classification = architecture.endswith("ForSequenceClassification")
    auto_class = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    try:
        return auto_class.from_pretrained(name)
    except SafetensorError as error:
        raise ValueError(f"the weights in {name} are damaged: {error}.") from error


def _config(name: str) -> PreTrainedConfig:
    directory = Path(name)
    if directory.is_dir() and not (directory / CONFIG_NAME).is_file():
        adapter = (directory / "adapter_config.json").is_file()
        remedy = ": it is an adapter; merge it into its model first (`merge_and_unload`)" if adapter else ""
        raise ValueError(f"there is no {CONFIG_NAME} in {directory}{remedy}.")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, HfHubHTTPError) as error:
        if directory.is_dir():
            raise ValueError(f"{directory / CONFIG_NAME} cannot be read: {error}") from error
        raise ValueError(f"{name} is neither a directory nor a model on the Hub that can be read now.") from error


def _local(name: str) -> str:
    """The directory of a model; one on the Hub is downloaded."""
    _config(name)
    return name if Path(name).is_dir() else snapshot_download(name)


def _batches(checkpoint: str, data: DataArguments, config: CompressionConfig, model: PreTrainedModel):
    """Batches to calibrate with and as many held out from that; None where no data is given and none is needed."""
    by_loss = config.rule[0] == "max_loss_increase"
    if data.data is not None:
        batches, held_out = calibration_batches(checkpoint, data, config.calibration_batches, config.seed)
        check_fit(model, [*batches, *held_out], data.data)
        return batches, held_out
    if by_loss or observe(model, config).needed:
        why = f"the reduction of a {model.config.model_type} model depends on its input"
        why = "--max_loss_increase measures the loss" if by_loss else why
        raise ValueError(f"{why}: give data like that of its training with --data.")
    return None, None


def _loss(model: PreTrainedModel, batches: list | None) -> float | None:
    """Mean loss on batches; None without any, or where they have no labels."""
    if not batches or "labels" not in batches[0]:
        return None
    batches = first_batches(batches, len(batches), model.device)
    return model_loss(model, tqdm(batches, desc="loss", unit="batch", leave=False, disable=None))()


def _new_directory(name: str) -> Path:
    path = Path(name)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already: name a new or an empty directory.")
    return path


def _save_tokenizer(source: str, directory: Path) -> None:
    """Copy the tokenizer of a model, if it has one."""
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    except (OSError, ValueError, KeyError):
        logger.info("%s has no tokenizer.", source)
