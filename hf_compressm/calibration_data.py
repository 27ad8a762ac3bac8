"""Calibration batches for the command line, from whatever a user has: a text, a table, or a dataset on the Hub."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_PIECE = 8192  # characters of a text file that are tokenised at once
_INPUTS = ("input_ids", "input_values")
_LABELS = ("labels", "label")
_COLUMNS = {  # what is in a row, kinds of numbers, dimensions
    "input_ids": ("a sequence of whole numbers", "iu", (1,)),
    "input_values": ("a sequence of numbers, or of channels of numbers,", "iuf", (1, 2)),
    "attention_mask": ("a sequence of zeros and ones", "biuf", (1,)),
    **dict.fromkeys(_LABELS, ("a number, or one for each token,", "iuf", (0, 1))),
}
_IGNORED = -100  # a label that does not count


@dataclass
class DataArguments:
    """The data to calibrate with."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A text file (.txt), a table (.parquet, .json, .jsonl, .csv) or the name of a dataset on the Hub. "
            "Its texts are tokenised with the tokenizer of the checkpoint; columns input_ids, or input_values for "
            "models of numbers, are taken as they are, with labels or label beside them if there are any."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset with several."})
    split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    sequence_length: int = field(
        default=256, metadata={"help": "Tokens per sequence; longer sequences of a table are cut."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences per batch."})

    def describe(self, batches: list) -> str:
        """The data of some batches, in words."""
        return f"{len(batches) * self.batch_size} sequences of {Path(self.data).name}"

    def __post_init__(self):
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is a number of at least 1; found {getattr(self, name)}.")


def calibration_batches(
    checkpoint: str, arguments: DataArguments, count: int, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """`count` batches to calibrate with, and up to as many others to measure on, taken at random from the data.

    Args:
        checkpoint: whose tokenizer reads the texts.
        arguments: what to read; `data` is given.
        count: number of batches.
        seed: of the choice.

    Raises:
        ValueError: the data is not there, has no column that fits, or is too short; what to do about it.
    """
    rows = _read(arguments).shuffle(seed=seed)
    size = arguments.batch_size
    wanted = 2 * count * size
    given = next((name for name in _INPUTS if name in rows.column_names), None)
    if given is not None:
        sequences = _columns(rows.select(range(min(wanted, len(rows)))), given, arguments.sequence_length)
    elif arguments.text_column in rows.column_names:
        sequences = _tokenised(rows, _tokenizer(checkpoint), arguments, wanted)
    else:
        raise ValueError(
            f"{arguments.data} has the columns {rows.column_names}; expected texts in {arguments.text_column!r} (name "
            f"another with --text_column), or {' or '.join(_INPUTS)}."
        )
    batches = [collate(sequences[first : first + size]) for first in range(0, len(sequences) - size + 1, size)]
    if not batches:
        raise ValueError(
            f"{arguments.data} gives {len(sequences)} sequences, less than one batch of {size}. Give more data, or a "
            "smaller --sequence_length or --batch_size."
        )
    return batches[:count], batches[count:]


def check_fit(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], name: str) -> None:
    """Refuse data that a model cannot read, before anything is done with them.

    Args:
        model: that is to read them.
        batches: as `calibration_batches` makes them.
        name: of the data, for people.

    Raises:
        ValueError: tokens for a model of numbers or the other way round, or tokens, labels or classes that the model
            does not have.
    """
    embeddings = model.get_input_embeddings()
    tokens = isinstance(embeddings, nn.Embedding)
    expected = "input_ids" if tokens else "input_values"
    if expected not in batches[0]:
        raise ValueError(f"expected {expected} for this model in {name}; found {next(iter(batches[0]))}.")
    if tokens:
        remedy = "Save the tokenizer that the model was trained with beside it, or give the token ids of that one."
        _check_range(batches, "input_ids", embeddings.num_embeddings, name, remedy)
    if type(model).__name__.endswith("ForSequenceClassification"):
        _check_classes(batches, model.config.num_labels, name)
    elif tokens:
        _check_range(batches, "labels", embeddings.num_embeddings, name, f"{_IGNORED} is for tokens without a label.")


def _check_classes(batches: list[dict[str, torch.Tensor]], count: int, name: str) -> None:
    labels = batches[0].get("labels")
    if labels is None:
        return
    if labels.dim() > 1:  # the tokens themselves
        raise ValueError(
            f"expected a label for each sequence of {name}; found none. Give a table with a column label."
        )
    if count > 1 and not labels.is_floating_point():
        _check_range(batches, "labels", count, name, "Number the classes as in the training of the model.")


def _check_range(batches: list[dict[str, torch.Tensor]], key: str, count: int, name: str, remedy: str) -> None:
    values = torch.cat([batch[key].flatten() for batch in batches])
    wrong = values[((values < 0) | (values >= count)) & ~((values == _IGNORED) & (key == "labels"))]
    if len(wrong):
        raise ValueError(f"expected {key} below {count}, as the model has them, in {name}; found {wrong[0]}. {remedy}")


def _read(arguments: DataArguments) -> Dataset:
    """The rows of the data; those of a text file are pieces of it."""
    path, suffix = Path(arguments.data), Path(arguments.data).suffix
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    if path.is_file() and suffix == ".txt":
        return Dataset.from_dict({arguments.text_column: _pieces(path)})
    if path.is_file() and suffix in _READERS:
        return _load(f"{path} as {suffix}", _READERS[suffix], data_files=str(path), split="train")
    if path.is_file():
        raise ValueError(f"expected a file .txt, {', '.join(_READERS)}; found {suffix or 'no suffix'} in {path}.")
    if path.is_dir():  # resolved, because "text" alone is a reader of the library
        return _load(f"the files in {path}", str(path.resolve()), arguments.dataset_config, split=arguments.split)
    if suffix in {".txt", *_READERS} or path.is_absolute():
        raise ValueError(f"there is no file {path}.")
    what = f"{path}, which is no file, from the Hub"
    return _load(what, arguments.data, arguments.dataset_config, split=arguments.split)


def _pieces(path: Path) -> list[str]:
    """The text of a file in pieces."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a text in UTF-8 in {path}; found {error}. Convert it, or give a table.") from error
    return [text[first : first + _PIECE] for first in range(0, len(text), _PIECE)]


def _load(what: str, *args, **options) -> Dataset:
    try:
        return load_dataset(*args, **options)
    except Exception as error:  # each reader has errors of its own
        cause = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
        why = str(cause).partition("\n")[0] or type(cause).__name__
        raise ValueError(f"cannot read {what}: {why}") from error


def _tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"there is no tokenizer in {checkpoint} to read texts with. Save the one of the model there "
            "(`tokenizer.save_pretrained`), or give a table with a column input_ids."
        ) from error


def _tokenised(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, wanted: int
) -> list[dict[str, Any]]:
    """Texts one after the other, cut at every `sequence_length` tokens, until there are as many as wanted."""
    length, end = arguments.sequence_length, tokenizer.eos_token_id
    tokens: list[int] = []
    for row in rows:
        text = row[arguments.text_column]
        if not isinstance(text, str):
            raise ValueError(f"expected texts in {arguments.text_column!r} of {arguments.data}; found {text!r:.60}.")
        tokens += chain(tokenizer(text)["input_ids"], [] if end is None else [end])
        if len(tokens) >= wanted * length:
            break
    starts = range(0, min(len(tokens) - length + 1, wanted * length), length)
    return [{"input_ids": np.array(tokens[first : first + length]), "labels": None} for first in starts]


def _columns(rows: Dataset, name: str, length: int) -> list[dict[str, Any]]:
    """Sequences that are there already, each with its label if there is one."""
    label = next((column for column in _LABELS if column in rows.column_names), None)
    masked = "attention_mask" in rows.column_names
    found = []
    for row in rows.with_format("numpy", columns=[name, *[label] * bool(label), *["attention_mask"] * masked]):
        values, labels = _numbers(row, name), _numbers(row, label) if label else None
        real = _numbers(row, "attention_mask") if masked else np.ones(len(values))
        per_token = name == "input_ids" and np.ndim(labels) == 1
        if len({len(values), len(real), *([len(labels)] if per_token else [])}) > 1:
            raise ValueError(f"expected labels and attention_mask as long as {name}; found other lengths in a row.")
        real = real.astype(bool)
        found.append({name: values[real][:length], "labels": labels[real][:length] if per_token else labels})
    found = [row for row in found if len(row[name])]
    channels = {np.size(row[name][0]) for row in found}
    if len(channels) > 1:
        raise ValueError(f"expected as many channels in each row of {name}; found {sorted(channels)!r:.60}.")
    return found


def _numbers(row: dict[str, Any], column: str) -> np.ndarray:
    """What a row has in a column, refused where it is something else than `_COLUMNS` says."""
    what, kinds, dimensions = _COLUMNS[column]
    found = np.asarray(row[column])
    missing = found[~np.isfinite(found)].tolist() if found.dtype.kind == "f" else []  # nothing is read as nan
    if missing or found.ndim not in dimensions or (found.size and found.dtype.kind not in kinds):
        raise ValueError(
            f"expected {what} in each row of the column {column}; found {missing or found.tolist()!r:.60}."
        )
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: shorter sequences are padded and masked. Tokens without labels are their own, padding not counted."""
    name = next(iter(rows[0]))
    lengths = np.array([len(row[name]) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    first = rows[0][name]
    values = np.zeros((*mask.shape, *first.shape[1:]), dtype=np.int64 if name == "input_ids" else np.float32)
    values[mask] = np.concatenate([row[name] for row in rows])
    batch = {name: torch.from_numpy(values)}
    if not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    labels = [row["labels"] for row in rows]
    if all(label is not None and np.ndim(label) == 0 for label in labels):
        batch["labels"] = torch.tensor(np.array(labels))
    elif name == "input_ids":
        padded = np.full(mask.shape, _IGNORED)
        padded[mask] = np.concatenate([row[name] if row["labels"] is None else row["labels"] for row in rows])
        batch["labels"] = torch.from_numpy(padded)
    return batch
