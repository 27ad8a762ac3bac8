"""Train a language model from scratch and shrink its state on the way.

Without arguments: bytes, and five minutes on two cores with the text in examples/data. Any argument of
`TrainingArguments` and `CompressionConfig` can be given, for instance `--tolerance 0.02` or `--max_steps 100`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import log
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from bpe_tokenizer import bpe_tokenizer
from byte_tokenizer import byte_tokenizer
from common import EvaluateAroundReductions, StepTimer, fail, parse_arguments, state_sizes
from hf_compressm import CompreSSMCallback
from metrics import most_likely_class, next_token_accuracy

DEFAULTS = {
    "output_dir": "outputs/pretrain_clm",
    "num_hidden_layers": 3,
    "num_train_epochs": 6,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
VOCAB_SIZE = 4096  # of a tokenizer that is learned


@dataclass
class DataArguments:
    """The text to learn from."""

    train_file: str = field(
        default=str(Path(__file__).parent / "data" / "tinyshakespeare.txt"),
        metadata={"help": "A text file (.txt), or a table with a column of texts (.parquet)."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The like to validate on. Default: the end of the training text."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub, instead of `train_file`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    validation_fraction: float = field(
        default=0.1,
        metadata={"help": "Part of the training text, at its end, to validate on if there is no other."},
    )
    tokenizer: str = field(
        default="bytes",
        metadata={
            "help": "'bytes'; 'bpe', learned from the training text; or a directory with a tokenizer, such as that of "
            "a model. It is saved with the model."
        },
    )
    vocab_size: int | None = field(default=None, metadata={"help": f"Tokens of 'bpe'. Default: {VOCAB_SIZE}."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens per training sequence."})


def load_texts(data: DataArguments) -> DatasetDict:
    """The texts, one per row of `text_column`, as splits "train" and, if there is one, "validation"."""
    if data.dataset_name:
        splits = load_dataset(data.dataset_name, data.dataset_config_name)
    else:
        files = {"train": data.train_file, "validation": data.validation_file}
        splits = DatasetDict({split: read_file(path, data.text_column) for split, path in files.items() if path})
    for split, texts in splits.items():
        if data.text_column not in texts.column_names:
            raise ValueError(
                f"split {split!r} has the columns {texts.column_names}, but no {data.text_column!r}; "
                "name the right one with --text_column"
            )
    return splits


def read_file(path: str, text_column: str) -> Dataset:
    """One row with a whole text file, or the rows of a parquet file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    match Path(path).suffix:
        case ".txt":
            return Dataset.from_dict({text_column: [Path(path).read_bytes().decode("utf-8")]})
        case ".parquet":
            return Dataset.from_parquet(path)
        case other:
            raise ValueError(f"expected a .txt or .parquet file, found {other or 'no suffix'} in {path}")


def load_tokenizer(data: DataArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name."""
    if data.tokenizer == "bpe":
        return bpe_tokenizer(training_texts(data), data.vocab_size or VOCAB_SIZE)
    if data.vocab_size is not None:
        raise ValueError("--vocab_size is that of --tokenizer bpe; the others have a size of their own")
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    if not Path(data.tokenizer).is_dir():
        raise ValueError(f"--tokenizer is 'bytes', 'bpe' or a directory; found {data.tokenizer!r}")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {data.tokenizer} has no token for the end of a text (`eos_token`)")
    return tokenizer


def training_texts(data: DataArguments) -> Iterator[str]:
    """The texts without what will validate, for a tokenizer to learn from."""
    splits = load_texts(data)
    texts = splits["train"][data.text_column]
    left = sum(map(len, texts))
    if "validation" not in splits:
        left -= round(data.validation_fraction * left)
    for text in texts:
        yield text[: max(0, left)]
        left -= len(text)


def load_sequences(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Training and validation sequences: the texts one after the other, cut at every `sequence_length` tokens."""
    length = data.sequence_length

    def cut(batch):
        texts = tokenizer(batch[data.text_column], return_attention_mask=False)["input_ids"]
        tokens = np.fromiter(chain.from_iterable([*text, tokenizer.eos_token_id] for text in texts), dtype=np.int32)
        rows = len(tokens) // length
        return {"input_ids": tokens[: rows * length].reshape(rows, length)}

    splits = load_texts(data)
    train = splits["train"]
    train = train.map(cut, batched=True, remove_columns=train.column_names)
    if "validation" in splits:
        validation = splits["validation"]
        validation = validation.map(cut, batched=True, remove_columns=validation.column_names)
    else:
        kept = len(train) - max(1, round(data.validation_fraction * len(train)))
        train, validation = train.select(range(max(0, kept))), train.select(range(max(0, kept), len(train)))
    if not len(train) or not len(validation):
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation sequences of {length} tokens are too few; "
            "give more text or a smaller --sequence_length"
        )
    return train.with_format("numpy"), validation.with_format("numpy")


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of equally long sequences; the model shifts the labels itself."""
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids}


def to_bytes(sequences: Dataset, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The text in `sequences`."""
    return tokenizer.decode(np.concatenate(sequences["input_ids"]), skip_special_tokens=True).encode()


def entropy(symbols: Iterable[int]) -> float:
    """Entropy in nats of symbols taken one by one: the loss of the best model without any context."""
    counts = Counter(symbols)
    return -sum(count / counts.total() * log(count / counts.total()) for count in counts.values())


def nats(loss: float | None) -> str:
    """A loss, or a dash for none."""
    return "-" if loss is None else f"{loss:.3f}"


def milliseconds(time: float | None) -> str:
    """A time, or a dash for none."""
    return "-" if time is None else f"{time:.0f}"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns of equal width, the numbers to the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    print()
    for label, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        print("  ".join([label.ljust(first), *numbers]).rstrip())
    print()


def main(args: list[str] | None = None) -> None:
    """Train, measure, save, print."""
    model_args, data_args, compression, training = parse_arguments(DataArguments, __doc__, DEFAULTS, args)
    set_seed(training.seed)
    try:
        tokenizer = load_tokenizer(data_args)
        config = model_args.config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        train, validation = load_sequences(data_args, tokenizer)
    except ValueError as error:
        fail(error)
    model = AutoModelForCausalLM.from_config(config)
    sizes, parameters = state_sizes(model.config), model.num_parameters()
    unit = "bytes" if data_args.tokenizer == "bytes" else "tokens"
    tokens, text = np.concatenate(validation["input_ids"]), to_bytes(validation, tokenizer)
    per_byte = len(tokens) / len(text)
    single = entropy(text)
    print(
        f"{len(train):,} training and {len(validation):,} validation sequences of {data_args.sequence_length} {unit}"
    )
    if unit == "tokens":
        print(f"{len(tokenizer):,} different tokens, {1 / per_byte:.2f} validation bytes per token")
        print(f"entropy of single validation tokens: {entropy(tokens.tolist()):.3f} nats")
    print(f"{parameters:,} parameters, state sizes {sizes}")
    print(f"entropy of single validation bytes: {single:.3f} nats, {single / log(2):.3f} bits")

    timer, around = StepTimer(), EvaluateAroundReductions(compression)
    callbacks = [timer, around, CompreSSMCallback(compression)] if model_args.do_compress else [timer]
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=most_likely_class,
        compute_metrics=next_token_accuracy,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    final = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(dataset=data_args.dataset_name or Path(data_args.train_file).name)
    if not trainer.is_world_process_zero():
        return

    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    end = trainer.state.global_step
    first, last = (around.before + 1, around.after) if model_args.do_compress else (end, end)
    rows = [("", "before", "after", "at the end"), ("optimizer step", f"{first - 1}", f"{last}", f"{end}")]
    for layer, (old, new) in enumerate(zip(sizes, state_sizes(model.config), strict=True)):
        rows.append((f"state size, layer {layer}", f"{old}", f"{new}", ""))
    rows += [
        ("parameters", f"{parameters:,}", f"{model.num_parameters():,}", ""),
        (
            "training step, median (ms)",
            milliseconds(timer.median_ms(range(1, first + 1))),
            milliseconds(timer.median_ms(range(last + 1, end + 1))),
            "",
        ),
    ]
    measured = [losses.get(around.before), losses.get(around.after), final["eval_loss"]]
    if unit == "tokens":
        rows.append(("validation loss (nats per token)", *map(nats, measured)))
    measured = [None if loss is None else loss * per_byte for loss in measured]
    rows.append(("validation loss (nats per byte)", *map(nats, measured)))
    rows.append(("entropy of single bytes (nats)", "", "", nats(single)))
    print_table(rows)
    print(f"{measured[-1] / log(2):.3f} bits per byte; {final['eval_accuracy']:.1%} of the {unit} guessed right")
    print(f"saved to {training.output_dir}")


if __name__ == "__main__":
    main()
