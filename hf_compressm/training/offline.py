"""Reduce a checkpoint on disk, between two runs: for engines under which parameters cannot change shape in place."""

import json
import logging
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, Trainer
from transformers.models.auto import modeling_auto
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, CHAT_TEMPLATE_DIR, CONFIG_NAME

from ..compression import compress
from ..config import CompressionConfig
from ..hub import CARD_NAME, PLOT_NAME
from ..param_groups import ssm_param_groups
from ..report import REPORT_NAME, CompressionEvent, CompressionReport
from ..surgery import drop_stale_state
from .callback import CompreSSMCallback
from .checkpoint import calibration_file
from .run_record import count_parameters

logger = logging.getLogger(__name__)

_FSDP_WEIGHTS = "pytorch_model_fsdp.bin"
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_SHARDS_OF_ENGINES = ("global_step*", "pytorch_model_fsdp_*", "optimizer_*", "latest", "zero_to_fp32.py")
_OWN = (CONFIG_NAME, REPORT_NAME, TRAINER_STATE_NAME, calibration_file("*"), OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)
_OPTIMIZERS: tuple[type[Optimizer], ...] = (
    torch.optim.AdamW,  # whose groups say themselves whether it is Adam
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adafactor,
    torch.optim.Muon,
    transformers.Adafactor,
)


def reduce_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    config: CompressionConfig,
    dataloader: Iterable | None = None,
) -> CompressionReport:
    """Write a checkpoint anew at the reduced size; the run that wrote it resumes from the result.

    For runs under an engine that a reduction cannot reach (FSDP1, DeepSpeed, tensor parallel), or whenever a stopped
    run is to be reduced. Weights and config are always rewritten. Of a checkpoint of the Trainer with an optimizer in
    one file, the moments follow the change of basis, and scheduler, random numbers and the Trainer's state go along; a
    warning says so if moments could not follow.

    Args:
        checkpoint: a directory that the Trainer or `save_pretrained` wrote; it is not changed.
        output_dir: a new or empty directory.
        config: the options; its schedule plays no part.
        dataloader: as for `compress`.

    Returns:
        The report of the checkpoint, if it has one, with one event more; also written to `output_dir`.

    Raises:
        ValueError: `checkpoint` holds no whole model, `output_dir` is not empty, or `compress` refuses the model.
    """
    source, target = Path(checkpoint), Path(output_dir)
    _check_directories(source, target)
    model = _load_model(source)
    saved, optimizer = _load_optimizer(source, model)
    tensors, parameters = sum(1 for _ in model.parameters()), count_parameters(model)
    event = compress(model, config, dataloader, optimizer).events[0]
    if saved and optimizer is None and sum(1 for _ in model.parameters()) != tensors:
        raise ValueError(
            "The reduction adds parameters, and their place in the optimizer is not known, because its groups are "
            'neither those of the Trainer nor those of `ssm_param_groups`. Use method="selection".'
        )
    state = _trainer_state(source)
    report = CompressionReport(config.to_dict())
    if (source / REPORT_NAME).is_file():
        report = CompressionReport.load(source)
    event.step = state.get("global_step", report.events[-1].step if report.events else None)
    if event.step is not None:
        event.log_entries = len(state.get("log_history", []))
    report.events.append(event)
    report.run.setdefault("parameters", {"before": parameters})["after"] = count_parameters(model)
    if event.changed:
        report.run.pop("loss", None)  # of the model before
    if not config.dry_run:
        _write(source, target, model, (CARD_NAME, PLOT_NAME) if event.changed else ())
        _write_optimizer(source, target, model, saved, optimizer)
        report.save(target)
        if state:  # last, because it makes a checkpoint whole
            _record(source, state, event, report, config)
            (target / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    return report


def _check_directories(source: Path, target: Path) -> None:
    if (source / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{source} holds adapters without their base. Merge them (`merge_and_unload`), then reduce.")
    if not (source / CONFIG_NAME).is_file() or not any(_matches(path, _WEIGHTS) for path in source.iterdir()):
        found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) if source.is_dir() else "no directory"
        raise ValueError(
            f"Expected {CONFIG_NAME} and whole weights (model.safetensors) in {source}; found {found}. Weights that "
            "an engine has sharded come together with `accelerate merge-weights` or zero_to_fp32.py; put config.json "
            "beside them."
        )
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"Expected a new or an empty directory for the reduced checkpoint; {target} is not empty.")


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _load_model(source: Path) -> nn.Module:
    """The model of the class that wrote the checkpoint, in its dtype."""
    config = AutoConfig.from_pretrained(source)
    names = config.architectures or []
    for mapping in (value for key, value in vars(modeling_auto).items() if key.startswith("MODEL_")):
        classes = mapping.get(type(config), ()) if isinstance(mapping, modeling_auto._LazyAutoMapping) else ()
        for cls in classes if isinstance(classes, tuple | list) else (classes,):
            if cls.__name__ in names:
                return cls.from_pretrained(source, dtype="auto")
    raise ValueError(f"Expected a model class that transformers knows in {source / CONFIG_NAME}; found {names}.")


def _load_optimizer(source: Path, model: nn.Module) -> tuple[dict[str, Any], Optimizer | None]:
    """The saved state, empty if there is none, and the optimizer that it is the state of, if that can be told."""
    file = next((source / name for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN) if (source / name).is_file()), None)
    if file is None:
        return {}, None
    saved = torch.load(file, map_location="cpu", weights_only=True)
    for groups in _possible_groups(saved, model):
        for cls in _OPTIMIZERS:
            if (optimizer := _rebuild(cls, groups, saved)) is not None:
                return saved, optimizer
    return saved, None


def _possible_groups(saved: dict[str, Any], model: nn.Module) -> list[list[list[nn.Parameter]]]:
    """Groups of parameters that the state may belong to, in their order."""
    params = dict(model.named_parameters())
    named = [group["params"] for group in saved["param_groups"]]
    if any(isinstance(name, str) for group in named for name in group):  # as engines consolidate it
        return [[[params[name] for name in group] for group in named]] if set().union(*named) <= params.keys() else []
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trainers = [[p for n, p in params.items() if (n in decayed) == decay] for decay in (True, False)]
    return [trainers, [group["params"] for group in ssm_param_groups(model, lr=0.0)], [list(params.values())]]


def _rebuild(cls: type[Optimizer], groups: list[list[nn.Parameter]], saved: dict[str, Any]) -> Optimizer | None:
    """An optimizer of this class and these groups with the saved state; None if it does not fit."""
    if [len(group) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
        return None
    try:
        optimizer = cls([{"params": group} for group in groups])
    except ValueError:  # Muon takes matrices only
        return None
    if optimizer.param_groups[0].keys() != saved["param_groups"][0].keys() - {"initial_lr"}:
        return None
    optimizer.load_state_dict(_by_position(saved))
    return None if drop_stale_state(optimizer) else optimizer


def _by_position(saved: dict[str, Any]) -> dict[str, Any]:
    """A state by names as one by positions, which is what `load_state_dict` takes."""
    places = {name: i for i, name in enumerate(name for group in saved["param_groups"] for name in group["params"])}
    groups = [group | {"params": [places[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": {places[name]: state for name, state in saved["state"].items()}, "param_groups": groups}


def _write(source: Path, target: Path, model: nn.Module, stale: tuple[str, ...]) -> None:
    """Model and config, in shards no larger than before, and the files that have nothing to do with sizes.

    Of the directories only that of the tokenizer: others are checkpoints and logs of the model before.
    """
    shards = [path.stat().st_size for path in source.glob("model-*.safetensors")]
    model.save_pretrained(target, **({"max_shard_size": max(shards)} if shards else {}))
    for path in source.iterdir():
        if _matches(path, (*_WEIGHTS, *_SHARDS_OF_ENGINES, *_OWN, *stale)) or (target / path.name).exists():
            continue
        if path.name == CHAT_TEMPLATE_DIR:
            shutil.copytree(path, target / path.name)
        elif path.is_file():
            shutil.copy2(path, target / path.name)
    if (source / _FSDP_WEIGHTS).is_file():
        torch.save(model.state_dict(), target / _FSDP_WEIGHTS)


def _write_optimizer(
    source: Path, target: Path, model: nn.Module, saved: dict[str, Any], optimizer: Optimizer | None
) -> None:
    """The optimizer's state as it is now; without moments, and a warning, if it is not known to which they belong."""
    if engine := sorted(path.name for path in source.iterdir() if _matches(path, _SHARDS_OF_ENGINES)):
        logger.warning(
            "The shards of %s (%s) were left out: the moments are reset. Start the run from the reduced model "
            "(`from_pretrained`).",
            source,
            ", ".join(engine[:4]),
        )
    if not saved:
        return
    by_name = any(isinstance(name, str) for group in saved["param_groups"] for name in group["params"])
    if optimizer is None:
        logger.warning(
            "The moments in %s are reset: its optimizer or the order of its parameters is not known. Expected one of "
            "%s, in the groups of the Trainer or of `ssm_param_groups`.",
            source,
            ", ".join(cls.__name__ for cls in _OPTIMIZERS),
        )
        new = saved | {"state": {}}
    else:
        new = optimizer.state_dict()
    if by_name and optimizer is not None:
        names = {id(param): name for name, param in model.named_parameters()}
        order = [names[id(param)] for group in optimizer.param_groups for param in group["params"]]
        groups = [group | {"params": [order[i] for i in group["params"]]} for group in new["param_groups"]]
        new = {"state": {order[i]: state for i, state in new["state"].items()}, "param_groups": groups}
    torch.save(new, target / (OPTIMIZER_NAME_BIN if by_name else OPTIMIZER_NAME))


def _trainer_state(source: Path) -> dict[str, Any]:
    file = source / TRAINER_STATE_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _record(
    source: Path, state: dict[str, Any], event: CompressionEvent, report: CompressionReport, config: CompressionConfig
) -> None:
    """Let the Trainer's state tell of the reduction as if it had taken place in training."""
    state["log_history"].append(event.summary() | {"epoch": state["epoch"], "step": state["global_step"]})
    if event.changed:
        state.update(best_metric=None, best_model_checkpoint=None, best_global_step=None)
    fresh = CompreSSMCallback(config).state()
    processes = max(1, len(list(source.glob("rng_state_*.pth"))))
    fresh["attributes"] |= {"max_steps": state["max_steps"], "processes": processes}
    saved = state.setdefault("stateful_callbacks", {}).setdefault(CompreSSMCallback.__name__, fresh)
    saved["attributes"] |= {"report": report.to_dict(), "calibrated": False}  # the sums are those of another basis
    if saved["attributes"].get("rollback"):
        saved["attributes"]["rollback"]["pending"] = None  # the next evaluation does not judge the last event alone
