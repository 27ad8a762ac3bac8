"""Data and options of `classify_sequences.py`."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

import classify_sequences
from metrics import sequence_accuracy


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def image_directory(tmp_path):
    """Twenty random colour images of 4 x 3 pixels in each split, as the Hub stores CIFAR-10, and their pixels."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 3, 4, 3), dtype=np.uint8)
    for split, images in zip(("train", "test"), pixels, strict=True):
        rows = {"img": [Image.fromarray(image) for image in images], "label": [i % 4 for i in range(20)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path, pixels


@pytest.fixture
def audio_directory(tmp_path):
    """Eight sounds of different lengths in each split, in 16-bit samples."""
    features = datasets.Features({"audio": datasets.List(datasets.Value("int16")), "label": datasets.Value("int64")})
    sounds = [np.random.default_rng(i).integers(-(2**15), 2**15, 5 + i).tolist() for i in range(8)]
    rows = datasets.Dataset.from_dict({"audio": sounds, "label": [0, 1] * 4}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path, sounds


def test_images_are_read_pixel_by_pixel(image_directory):
    directory, pixels = image_directory
    *splits, classes = classify_sequences.load_sequences(classify_sequences.DataArguments(data_dir=str(directory)))
    assert classes == 4
    for split, expected in zip(splits, pixels, strict=True):
        assert np.array_equal(split.sequences, expected.reshape(20, 12, 3))
        assert split.sequences[0].dtype == np.uint8
        assert split.labels == [i % 4 for i in range(20)]


def test_sounds_are_cut_and_counted(audio_directory):
    directory, sounds = audio_directory
    data = classify_sequences.DataArguments(data_dir=str(directory), max_length=9)
    train, _, classes = classify_sequences.load_sequences(data)
    assert classes == 2
    assert [values[:, 0].tolist() for values in train.sequences] == [sound[:9] for sound in sounds]
    assert train.sequences[0].dtype == np.int16


def test_moments_are_those_of_all_samples(audio_directory):
    directory, sounds = audio_directory
    train, *_ = classify_sequences.load_sequences(classify_sequences.DataArguments(data_dir=str(directory)))
    mean, std = train.moments()
    together = np.concatenate(sounds)
    assert mean == pytest.approx(together.mean())
    assert std == pytest.approx(together.std())


def test_batches_are_standardised_padded_and_masked():
    rows = [(np.array([[1], [3]], dtype=np.int16), 1), (np.array([[5]], dtype=np.int16), 0)]
    batch = classify_sequences.collate(rows, mean=np.array([3.0]), std=np.array([2.0]))
    assert batch["input_values"].tolist() == [[[-1.0], [0.0]], [[1.0], [0.0]]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_values"].dtype == torch.float32
    assert "attention_mask" not in classify_sequences.collate(rows[:1], np.array([3.0]), np.array([2.0]))


def test_digits_are_split_without_overlap():
    train, test, classes = classify_sequences.load_bundled_digits()
    assert (len(train), len(test), classes) == (1438, 359, 10)
    again, *_ = classify_sequences.load_bundled_digits()
    assert all(np.array_equal(a, b) for a, b in zip(train.sequences, again.sequences, strict=True))
    seen = {values.tobytes() for values in train.sequences}
    assert not [values for values in test.sequences if values.tobytes() in seen]


def test_accuracy_agrees_with_scikit_learn():
    predictions, labels = np.random.default_rng(0).integers(0, 3, (2, 1000))
    found = sequence_accuracy(EvalPrediction(predictions, labels))
    assert found == {"accuracy": pytest.approx(accuracy_score(labels, predictions))}


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_training_on_a_directory_without_compression(kind, request, tmp_path):
    directory, _ = request.getfixturevalue(f"{kind}_directory")
    output = tmp_path / "output"
    where = ["--data_dir", str(directory), "--output_dir", str(output), "--disable_tqdm", "true"]
    sizes = ["--hidden_size", "8", "--state_size", "4", "6", "--num_hidden_layers", "2"]
    batches = ["--max_steps", "3", "--per_device_train_batch_size", "4"]
    classify_sequences.main([*where, *sizes, *batches, "--no_do_compress"])
    results = json.loads((output / "results.json").read_text())
    assert results["state_sizes_before"] == results["state_sizes"] == [4, 6]
    assert results["parameters_before"] == results["parameters"]
    assert np.isfinite(results["loss"])
    assert len(results["mean"]) == {"image": 3, "audio": 1}[kind]
    assert not (output / "compression_report.json").exists()


def test_state_space_layers_have_their_own_learning_rate(image_directory, tmp_path, monkeypatch):
    trainers = []

    class RecordingTrainer(classify_sequences.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            trainers.append(self)

    monkeypatch.setattr(classify_sequences, "Trainer", RecordingTrainer)
    where = ["--data_dir", str(image_directory[0]), "--output_dir", str(tmp_path / "output"), "--disable_tqdm", "true"]
    rates = ["--learning_rate", "0.01", "--ssm_lr_factor", "0.5", "--lr_scheduler_type", "constant"]
    steps = ["--warmup_steps", "0", "--max_steps", "1", "--hidden_size", "8", "--no_do_compress"]
    classify_sequences.main([*where, *rates, *steps])
    (trainer,) = trainers
    rate = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rate[id(parameter)] == (0.005 if ".mixer." in name else 0.01), name


def test_bad_input_ends_with_one_line(tmp_path):
    only_train, unlabelled = tmp_path / "only_train", tmp_path / "unlabelled"
    datasets.Dataset.from_dict({"image": [1]}).to_parquet(only_train / "train.parquet")
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"picture": [1], "label": [0]}).to_parquet(unlabelled / f"{split}.parquet")
    cases = {
        "there is no train*.parquet and no test*.parquet in the directory": ["--data_dir", str(tmp_path / "nowhere")],
        "there is no test*.parquet in the directory": ["--data_dir", str(only_train)],
        "expected a column 'label' and one of": ["--data_dir", str(unlabelled)],
        "not both": ["--data_dir", str(tmp_path), "--dataset_name", "ylecun/mnist"],
        "`reduction_fraction` is a fraction": ["--reduction_fraction", "1.5"],
    }
    for message, options in cases.items():
        with pytest.raises(SystemExit) as stop:
            classify_sequences.main(["--output_dir", str(tmp_path / "output"), *options])
        assert stop.value.code.startswith("error: ")
        assert message in stop.value.code
        assert "\n" not in stop.value.code
