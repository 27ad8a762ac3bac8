"""Classify images read pixel by pixel, or sounds sample by sample, with a state that shrinks during training.

    python examples/classify_sequences.py                                   8x8 digits of scikit-learn
    python examples/classify_sequences.py --dataset_name ylecun/mnist       sequential MNIST, 784 steps
    python examples/classify_sequences.py --dataset_name uoft-cs/cifar10    sequential CIFAR, 1024 steps of RGB
    python examples/classify_sequences.py --data_dir path/to/parquet        train*.parquet and test*.parquet

A dataset has a column "label", and a column "image" or "img" of images or "audio" of sounds as lists of samples. Every
channel is shifted and scaled to mean 0 and standard deviation 1 over the training set.
Ends with one line of JSON, which is also `results.json` in the output directory.
"""

import io
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, List, load_dataset
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from transformers import AutoModelForSequenceClassification, Trainer, set_seed

from common import EvaluateAroundReductions, StepTimer, fail, parse_arguments, state_sizes
from hf_compressm import CompreSSMCallback, ssm_param_groups
from metrics import most_likely_class, sequence_accuracy

DEFAULTS = {
    "output_dir": "outputs/classify_sequences",
    "num_train_epochs": 40,
    "per_device_train_batch_size": 50,
    "per_device_eval_batch_size": 100,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
INPUT_COLUMNS = ("image", "img", "audio")


@dataclass
class DataArguments:
    """The sequences, and the learning rate of the state space layers."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Directory of train*.parquet and test*.parquet, instead of the digits."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of a dataset on the Hub, instead of the digits."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Cut longer sequences."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random part of this size."})
    ssm_lr_factor: float = field(
        default=0.25, metadata={"help": "Learning rate of the state space layers, relative to the rest."}
    )


class Sequences(torch.utils.data.Dataset):
    """Labelled sequences in memory, each `(length, channels)` in the integers they came in."""

    def __init__(self, sequences: list[np.ndarray], labels: list[int]):
        self.sequences = sequences
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.sequences[index], self.labels[index]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of every channel."""
        count = sum(map(len, self.sequences))
        mean = sum(values.sum(axis=0, dtype=np.float64) for values in self.sequences) / count
        square = sum(np.square(values, dtype=np.float64).sum(axis=0) for values in self.sequences) / count
        return mean, np.sqrt(square - mean**2)


def collate(rows: list[tuple[np.ndarray, int]], mean: np.ndarray, std: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch of standardised sequences; shorter ones are padded and masked."""
    sequences, labels = zip(*rows, strict=True)
    lengths = np.array([len(values) for values in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    values = np.zeros((*mask.shape, len(mean)), dtype=np.float32)
    values[mask] = (np.concatenate(sequences) - mean) / std
    batch = {"input_values": torch.from_numpy(values), "labels": torch.tensor(labels)}
    if not mask.all():
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
    return batch


def load_bundled_digits() -> tuple[Sequences, Sequences, int]:
    """The 1,797 digits of scikit-learn; a fixed random fifth of them for the test."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    sequences = pixels.astype(np.uint8)[..., None]
    return *(Sequences(list(sequences[part]), labels[part].tolist()) for part in (train, test)), 10


def load_sequences(data: DataArguments) -> tuple[Sequences, Sequences, int]:
    """Training set, test set and number of classes."""
    if data.data_dir and data.dataset_name:
        raise ValueError("give --data_dir or --dataset_name, not both")
    if data.dataset_name:
        splits = load_dataset(data.dataset_name)
    elif data.data_dir:
        splits = load_parquet(Path(data.data_dir))
    else:
        return load_bundled_digits()
    train = splits["train"]
    if data.max_train_samples and data.max_train_samples < len(train):
        train = train.shuffle(seed=0).select(range(data.max_train_samples))
    classes = train.features["label"]
    num_classes = getattr(classes, "num_classes", None) or 1 + max(train["label"])
    return *(to_sequences(split, data.max_length) for split in (train, splits["test"])), num_classes


def load_parquet(directory: Path) -> DatasetDict:
    """The splits "train" and "test" of a directory in the layout of the Hub."""
    files = {split: sorted(map(str, directory.glob(f"{split}*.parquet"))) for split in ("train", "test")}
    missing = [f"{split}*.parquet" for split, found in files.items() if not found]
    if missing:
        raise ValueError(f"there is no {' and no '.join(missing)} in the directory {directory}")
    return load_dataset("parquet", data_files=files)


def to_sequences(rows: Dataset, max_length: int | None) -> Sequences:
    """Images as their pixels, row by row; sounds as their samples."""
    column = next((name for name in INPUT_COLUMNS if name in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise ValueError(f"expected a column 'label' and one of {INPUT_COLUMNS}; found {rows.column_names}")
    match rows.features[column]:
        case Image():
            images = rows.cast_column(column, Image(decode=False))[column]
            sequences = [read_pixels(image["bytes"]) for image in images]
        case List(feature=sample):
            sequences = [samples[:, None].astype(sample.dtype) for samples in rows.with_format("numpy")[column]]
        case other:
            raise ValueError(f"expected images or lists of samples in the column {column!r}; found {other}")
    return Sequences([values[:max_length] for values in sequences], list(rows["label"]))


def read_pixels(encoded: bytes) -> np.ndarray:
    """An encoded image as an array `(pixels, channels)` of bytes."""
    image = np.asarray(PillowImage.open(io.BytesIO(encoded)))
    return image.reshape(image.shape[0] * image.shape[1], -1)


def main(args: list[str] | None = None) -> None:
    """Train, evaluate, save, print."""
    model_args, data_args, compression, training = parse_arguments(DataArguments, __doc__, DEFAULTS, args)
    set_seed(training.seed)
    if model_args.model_type != "mimo_ssm":
        fail(f"sequences of numbers take --model_type mimo_ssm; a {model_args.model_type} model reads tokens")
    try:
        train, test, num_classes = load_sequences(data_args)
        mean, std = train.moments()
        config = model_args.config(input_size=len(mean), num_labels=num_classes)
    except ValueError as error:
        fail(error)
    model = AutoModelForSequenceClassification.from_config(config)
    sizes, parameters = state_sizes(model.config), model.num_parameters()
    print(f"{len(train):,} training and {len(test):,} test sequences, {len(mean)} channels, {num_classes} classes")
    print(f"{parameters:,} parameters, state sizes {sizes}")

    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
    groups = ssm_param_groups(
        model,
        lr=training.learning_rate,
        ssm_lr=training.learning_rate * data_args.ssm_lr_factor,
        weight_decay=training.weight_decay,
    )
    timer = StepTimer()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        data_collator=partial(collate, mean=mean, std=std),
        preprocess_logits_for_metrics=most_likely_class,
        compute_metrics=sequence_accuracy,
        optimizers=(optimizer_class(groups, **options), None),
        callbacks=[timer, EvaluateAroundReductions(compression), CompreSSMCallback(compression)]
        if model_args.do_compress
        else [timer],
    )
    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    final = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    data_name = data_args.dataset_name or (Path(data_args.data_dir).name if data_args.data_dir else "sklearn digits")
    trainer.create_model_card(dataset=data_name)
    if not trainer.is_world_process_zero():
        return

    end = trainer.state.global_step
    events = compression.events(end) if model_args.do_compress else [end]
    results = {
        "accuracy": final["eval_accuracy"],
        "loss": final["eval_loss"],
        "state_sizes_before": sizes,
        "state_sizes": state_sizes(model.config),
        "parameters_before": parameters,
        "parameters": model.num_parameters(),
        "steps": end,
        "train_seconds": trained.metrics["train_runtime"],
        "step_ms_before": timer.median_ms(range(1, events[0] + 1)),
        "step_ms_after": timer.median_ms(range(events[-1] + 1, end + 1)),
        "seed": training.seed,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    line = json.dumps(results)
    Path(training.output_dir, "results.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
