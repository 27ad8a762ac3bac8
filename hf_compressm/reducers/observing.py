"""Reducers of layers whose Gramians depend on the input: what they keep of the forward passes they see."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..surgery import Ranks
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
    observed alone is split in time, and enters the sums whole. What several ranks observe is what one process would of
    the same batches: their sequences are numbered in turn.
    """

    needs_observation = True

    def __init__(self, module: nn.Module, method: str = "auto", seed: int = 0):
        super().__init__(module, method, seed)
        self._sums: dict[str, Tensor] = {}
        self._samples: dict[int, Tensor] = {}  # by the number of the sequence
        self._passes = self._sequences = self._sampled = 0  # over all ranks; sampled tokens, with padding

    @property
    def state_size(self) -> int:
        return self.module.ssm_state_size

    @property
    def observed(self) -> bool:
        return bool(self._sums and self._samples)

    @abstractmethod
    def _accumulate(
        self, hidden: Tensor, mask: Tensor | None, spans: list[slice], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """Sums over the tokens of some sequences `hidden` (batch, L, hidden_size) that add up over calls.

        `mask` (batch, L) is False at padding; activations are to be recomputed for one of the `spans` of time at once,
        which follow each other; there is one of the `generators`, on the CPU, for each sequence.
        """

    @torch.no_grad()
    def observe(self, args: tuple, kwargs: dict) -> None:
        hidden, mask = _sequences(args, kwargs)
        numbers = range(self._sequences + self.rank * len(hidden), self._sequences + (self.rank + 1) * len(hidden))
        self._sample(hidden, mask, numbers)
        held_out = [number % 2 == 1 and number in self._samples for number in numbers]
        generators = [self._generator(number) for number, out in zip(numbers, held_out, strict=True) if not out]
        fitted = ~torch.tensor(held_out, device=hidden.device)
        hidden, mask = hidden[fitted], None if mask is None else mask[fitted]
        length, tokens = hidden.shape[1], max(1, _PASS_ELEMENTS // self.module.intermediate_size)
        spans = [slice(start, min(start + tokens, length)) for start in range(0, length, tokens)]
        rows = max(1, tokens // max(1, length))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                part_mask = None if mask is None else mask[part]
                found = self._accumulate(hidden[part], part_mask, spans, generators[part])
                add_sums(self._sums, found)
        self._passes += 1
        self._sequences += self.ranks * len(held_out)

    def statistics(self) -> dict[str, Tensor]:
        samples = {f"sample.{number}": sample for number, sample in self._samples.items()}
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        counts = {name: torch.tensor(getattr(self, f"_{name}")) for name in _COUNTS}
        return sums | samples | counts

    def load_statistics(self, *processes: dict[str, Tensor]) -> None:
        statistics = _merged(processes)
        device = next(self.module.parameters()).device
        self.load_counts(statistics)
        self._sums = {name: t.to(device) for name, t in _below(statistics, "sum.").items()}
        self._samples = {int(number): t.to(device) for number, t in _below(statistics, "sample.").items()}

    def load_counts(self, statistics: dict[str, Tensor]) -> None:
        for name in _COUNTS:
            setattr(self, f"_{name}", int(statistics[name]))

    def reduce_over_ranks(self, ranks: Ranks) -> None:
        self.load_statistics(*ranks.gather({name: t.cpu() for name, t in self.statistics().items()}))

    def _require_observation(self) -> None:
        if not self.observed:
            raise ArithmeticError(
                "Expected the layer to have been observed; found no forward pass with at least one token. Pass "
                "calibration batches, or reduce after some training steps."
            )

    def _generator(self, number: int) -> torch.Generator:
        """Of the random numbers of one sequence: the same whatever else draws some, on whichever rank."""
        key = repr((self.seed, self.module.layer_idx, number))
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
        return torch.Generator().manual_seed(seed)

    def _sample(self, hidden: Tensor, mask: Tensor | None, numbers: range) -> None:
        """Keep the beginnings of some sequences. Which tokens have room depends on nothing that other ranks see."""
        length = min(hidden.shape[1], _SAMPLE_LENGTH)
        room = min(_SAMPLE_PER_PASS, _SAMPLE_TOTAL - self._sampled)
        for row, number in enumerate(numbers):
            sequence = hidden[row] if mask is None else hidden[row][mask[row]]
            sequence = sequence[: max(0, min(length, room - (number - self._sequences) * length))]
            if len(sequence):
                self._samples[number] = sequence.detach().clone()
        self._sampled += min(room, self.ranks * len(hidden) * length)

    def _fit_and_held_out(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Inputs (batch, L, hidden_size), which of them are real, and which of these count, to fit on and held out."""
        halves = [[self._samples[i] for i in sorted(self._samples) if i % 2 == odd] for odd in (0, 1)]
        if not all(halves):
            hidden, real = _padded(halves[0] + halves[1])
            time = torch.arange(hidden.shape[1], device=hidden.device)
            late = time >= real.sum(1, keepdim=True) / 2
            return [(hidden, real, real & ~late), (hidden, real, real & late)]
        return [(hidden, real, real) for hidden, real in map(_padded, halves)]


_COUNTS = ("passes", "sequences", "sampled")


def _below(statistics: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in statistics.items() if name.startswith(prefix)}


def _merged(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Statistics of all ranks together; each has counted for all, as if all had seen as many sequences."""
    merged: dict[str, Tensor] = {}
    for statistics in ranks:
        add_sums(merged, {name: t for name, t in statistics.items() if name.startswith("sum.")})
        for name in _COUNTS:
            merged[name] = torch.maximum(merged.get(name, statistics[name]), statistics[name])
        for key, sample in _below(statistics, "sample.").items():
            number = int(key)
            while f"sample.{number}" in merged:  # where they have not: even numbers are fitted on, odd ones held out
                number += 2
            merged[f"sample.{number}"] = sample
    return merged


def _padded(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences as one batch (N, L, hidden_size), and where they are real (N, L)."""
    hidden = pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples], device=hidden.device)
    return hidden, torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


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


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of `x`."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
