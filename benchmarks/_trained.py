"""Language models that several benchmarks reduce: trained once on tinyshakespeare by the example, byte by byte."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .common import ROOT, run_example

LAYERS, SEQUENCE_LENGTH, BATCH, STEPS = 2, 256, 8, 600
HIDDEN_SIZE = 96
STATE_SIZE = {"reducible_mamba": 64, "reducible_mamba2": 128, "mimo_ssm": 128}
VALIDATION_FRACTION = 0.1  # the default of the example: the end of the text


def trained_model(model_type: str, seed: int, directory: Path) -> Path:
    """Where the trained model is; it is trained first if it is not there."""
    output = directory / f"{model_type}-{seed}"
    if not (output / "model.safetensors").exists():
        run_example(
            "pretrain_clm.py",
            {
                "output_dir": output,
                "model_type": model_type,
                "hidden_size": HIDDEN_SIZE,
                "state_size": STATE_SIZE[model_type],
                "num_hidden_layers": LAYERS,
                "sequence_length": SEQUENCE_LENGTH,
                "per_device_train_batch_size": BATCH,
                "max_steps": STEPS,
                "do_compress": False,
                "seed": seed,
                "eval_strategy": "no",
                "disable_tqdm": True,
            },
            log=output.with_suffix(".log"),
        )
    return output


def load(path: Path) -> nn.Module:
    """The model, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(path).eval()


def splits() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation sequences of the example, (rows, SEQUENCE_LENGTH); a byte is its own token."""
    text = np.frombuffer((ROOT / "examples" / "data" / "tinyshakespeare.txt").read_bytes(), dtype=np.uint8)
    rows = len(text) // SEQUENCE_LENGTH
    tokens = torch.from_numpy(text[: rows * SEQUENCE_LENGTH].reshape(rows, SEQUENCE_LENGTH).astype(np.int64))
    kept = rows - round(VALIDATION_FRACTION * rows)
    return tokens[:kept], tokens[kept:]


def batches(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Model inputs of `BATCH` sequences each."""
    return [{"input_ids": part, "labels": part} for part in tokens.split(BATCH)]


def calibration(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """`count` batches of random training sequences."""
    train, _ = splits()
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: count * BATCH]
    return batches(train[chosen])


def validation(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of `count` validation sequences, evenly spaced."""
    _, held_out = splits()
    return batches(held_out[torch.linspace(0, len(held_out) - 1, count).long()])


@torch.no_grad()
def loss(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss of equally long sequences, nats per byte."""
    total = sum(float(model(**batch).loss) * len(batch["input_ids"]) for batch in data)
    return total / sum(len(batch["input_ids"]) for batch in data)
