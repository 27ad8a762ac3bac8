"""Calibration batches for the command line, from whatever a user has: a text, a table, or a dataset on the Hub."""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
_PIECE = 8192  # characters of a text file that are tokenised at once
_INPUTS = ("input_ids", "input_values")
_LABELS = ("labels", "label")


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


def _read(arguments: DataArguments) -> Dataset:
    """The rows of the data; those of a text file are pieces of it."""
    path, suffix = Path(arguments.data), Path(arguments.data).suffix
    if path.is_file() and suffix == ".txt":
        text = path.read_text(encoding="utf-8")
        pieces = [text[first : first + _PIECE] for first in range(0, len(text), _PIECE)]
        return Dataset.from_dict({arguments.text_column: pieces})
    if path.is_file() and suffix in _READERS:
        return load_dataset(_READERS[suffix], data_files=str(path), split="train")
    if path.is_file():
        raise ValueError(f"expected a file .txt, {', '.join(_READERS)}; found {suffix or 'no suffix'} in {path}.")
    if suffix in {".txt", *_READERS} or path.is_absolute():
        raise ValueError(f"there is no file {path}.")
    return load_dataset(arguments.data, arguments.dataset_config, split=arguments.split)


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
        tokens += chain(tokenizer(row[arguments.text_column])["input_ids"], [] if end is None else [end])
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
        values, labels = np.asarray(row[name]), row[label] if label else None
        real = np.asarray(row["attention_mask"], dtype=bool) if masked else np.ones(len(values), dtype=bool)
        per_token = name == "input_ids" and np.ndim(labels) == 1
        found.append({name: values[real][:length], "labels": labels[real][:length] if per_token else labels})
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
        padded = np.full(mask.shape, -100)
        padded[mask] = np.concatenate([row[name] if row["labels"] is None else row["labels"] for row in rows])
        batch["labels"] = torch.from_numpy(padded)
    return batch
