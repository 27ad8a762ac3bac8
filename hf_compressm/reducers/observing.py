"""Reducers of layers whose Gramians depend on the input: what they keep of the forward passes they see."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .base import StateReducer

# A sample of the layer's inputs, to fit reductions on and to compare them: whole beginnings of sequences, because the
# state starts there.
_SAMPLE_LENGTH = 512  # tokens of one sequence
_SAMPLE_PER_PASS = 1024  # tokens of one forward pass
_SAMPLE_TOTAL = 4096  # tokens of one layer
_PASS_ELEMENTS = 2**24  # of the layer's inner activations that are recomputed at once, however long the sequences


class ObservingReducer(StateReducer):
    """Keeps sums over all tokens seen, whose size is that of the state squared, and a bounded sample of inputs.

    Sequences of the sample alternate between those to fit on and those held out, which enter no sum. Only a sequence
    observed alone is split in time, and enters the sums whole.
    """

    needs_observation = True

    def __init__(self, module: nn.Module, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._sums: dict[str, Tensor] = {}
        self._samples: list[Tensor] = []
        self._passes = 0

    @property
    def state_size(self) -> int:
        return self.module.ssm_state_size

    @property
    def observed(self) -> bool:
        return bool(self._sums and self._samples)

    @abstractmethod
    def _accumulate(
        self, hidden: Tensor, mask: Tensor | None, spans: list[slice], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Sums over the tokens of some sequences `hidden` (batch, L, hidden_size) that add up over calls.

        `mask` (batch, L) is False at padding; activations are to be recomputed for one of the `spans` of time at once,
        which follow each other; the `generator` is on the CPU.
        """

    @torch.no_grad()
    def observe(self, args: tuple, kwargs: dict) -> None:
        hidden, mask = _sequences(args, kwargs)
        generator = torch.Generator().manual_seed(self._noise_seed())
        fitted = ~self._sample(hidden, mask)
        hidden, mask = hidden[fitted], None if mask is None else mask[fitted]
        length, tokens = hidden.shape[1], max(1, _PASS_ELEMENTS // self.module.intermediate_size)
        spans = [slice(start, min(start + tokens, length)) for start in range(0, length, tokens)]
        rows = max(1, tokens // max(1, length))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                found = self._accumulate(hidden[part], None if mask is None else mask[part], spans, generator)
                add_sums(self._sums, found)
        self._passes += 1

    def statistics(self) -> dict[str, Tensor]:
        samples = {f"sample.{i}": sample for i, sample in enumerate(self._samples)}
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        return sums | samples | {"passes": torch.tensor(self._passes)}

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        device = next(self.module.parameters()).device
        self._passes = int(statistics["passes"])
        self._sums = {
            name.removeprefix("sum."): value.to(device)
            for name, value in statistics.items()
            if name.startswith("sum.")
        }
        self._samples = []
        for i in count():
            if f"sample.{i}" not in statistics:
                break
            self._samples.append(statistics[f"sample.{i}"].to(device))

    def reduce_over_ranks(self, all_reduce: Callable[[Tensor], None]) -> None:
        self._require_observation()  # a rank that has nothing to add would leave the others waiting
        for name in sorted(self._sums):
            all_reduce(self._sums[name])

    def _require_observation(self) -> None:
        if not self.observed:
            raise ArithmeticError(
                "Expected the layer to have been observed; found no forward pass with at least one token. Pass "
                "calibration batches, or reduce after some training steps."
            )

    def _noise_seed(self) -> int:
        """Of the random numbers of one forward pass: the same whatever else draws some, and different elsewhere."""
        key = repr((self.seed, self.module.layer_idx, self._passes, self.sample_offset))
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)

    def _sample(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Keep the beginnings of some sequences; which of them, (batch,) bool, are held out."""
        held_out = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        room = min(_SAMPLE_PER_PASS, _SAMPLE_TOTAL - sum(len(sample) for sample in self._samples))
        for row in range(len(hidden)):
            sequence = hidden[row] if mask is None else hidden[row][mask[row]]
            sequence = sequence[: min(_SAMPLE_LENGTH, room)]
            if len(sequence):
                held_out[row] = len(self._samples) % 2 == 1
                self._samples.append(sequence.detach().clone())
                room -= len(sequence)
        return held_out

    def _fit_and_held_out(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Inputs (batch, L, hidden_size), which of them are real, and which of these count, to fit on and held out."""
        if len(self._samples) == 1:
            hidden = self._samples[0][None]
            real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            early = torch.arange(hidden.shape[1], device=hidden.device) < hidden.shape[1] / 2
            return [(hidden, real, real & early), (hidden, real, real & ~early if hidden.shape[1] > 1 else real)]
        parts = []
        for samples in (self._samples[::2], self._samples[1::2]):
            hidden = pad_sequence(samples, batch_first=True)
            lengths = torch.tensor([len(sample) for sample in samples], device=hidden.device)
            real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            parts.append((hidden, real, real))
        return parts


def _sequences(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
    """Inputs of a stock or a reducible mixer as sequences that start with no state: (batch, L, hidden_size), and the
    mask (batch, L) of real tokens, None if all are real. Rows that pack several sequences are taken apart."""
    hidden = args[0] if args else kwargs["hidden_states"]
    mask = kwargs.get("token_mask")
    if mask is None:
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
    if mask is not None:
        mask = mask[:, -hidden.shape[1] :].to(device=hidden.device, dtype=torch.bool)
    packed = kwargs.get("seq_idx")
    if packed is not None:
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask
        hidden, mask = (_unpack(rows, packed) for rows in (hidden, real))
    return hidden, None if mask is None or mask.all() else mask


def _unpack(rows: Tensor, packed: Tensor) -> Tensor:
    """The sequences of `rows` (batch, L, ...), of which `packed` (batch, L) holds the numbers, each in its own row."""
    borders = [(numbers.diff() != 0).nonzero()[:, 0].cpu() + 1 for numbers in packed]
    parts = [part for row, border in zip(rows, borders, strict=True) for part in row.tensor_split(border)]
    return pad_sequence(parts, batch_first=True)


def add_sums(totals: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add to `totals` what was `found`, in place."""
    for name, value in found.items():
        totals[name] = totals[name] + value if name in totals else value


def with_context(
    hidden: Tensor, mask: Tensor | None, span: slice, kernel_size: int
) -> tuple[Tensor, Tensor | None, int]:
    """`span` of some sequences with the time steps before it that a causal convolution reads, and their number."""
    start = max(0, span.start - kernel_size + 1)
    part = slice(start, span.stop)
    return hidden[:, part], None if mask is None else mask[:, part], span.start - start


def causal_convolution(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """The depthwise causal convolution `conv` of `x` (batch, L, channels) in the dtype of `x`."""
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    y = F.conv1d(x.mT, conv.weight.to(x.dtype), bias, padding=conv.kernel_size[0] - 1, groups=conv.groups)
    return y[..., : x.shape[1]].mT


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of `x`."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
