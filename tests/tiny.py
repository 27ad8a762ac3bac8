"""Small models and real text for the tests."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from hf_compressm import MimoSSMConfig, MimoSSMForCausalLM

TEXT = Path(__file__).parents[1] / "examples" / "data" / "tinyshakespeare.txt"


class Windows(Dataset):
    """Consecutive windows of bytes."""

    def __init__(self, length: int = 64, count: int = 256):
        data = torch.frombuffer(bytearray(TEXT.read_bytes()[: length * count]), dtype=torch.uint8).long()
        self.rows = data.reshape(count, length)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_lm(state_size: int = 32, hidden_size: int = 16, layers: int = 2, seed: int = 0, **options):
    torch.manual_seed(seed)
    config = MimoSSMConfig(
        vocab_size=256, hidden_size=hidden_size, state_size=state_size, num_hidden_layers=layers, **options
    )
    return MimoSSMForCausalLM(config)


def batch(size: int = 8, length: int = 64):
    rows = torch.stack([row["input_ids"] for row, _ in zip(Windows(length), range(size), strict=False)])
    return {"input_ids": rows, "labels": rows}


def train(model, optimizer, steps: int = 5, **batch_options):
    """A few real steps; the losses."""
    model.train()
    data = batch(**batch_options)
    losses = []
    for _ in range(steps):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_sizes(model) -> list[int]:
    return [layer.mixer.state_size for layer in model.model.layers]
