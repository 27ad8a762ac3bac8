"""Random signals of selective layers, and plain loops over them, for the tests of `hf_compressm.mor`."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hf_compressm.mor import SelectiveSignals, SSDSignals


def selective_layer(
    seed: int = 0, *, states: int = 16, channels: int = 8, batch: int = 4, length: int = 128
) -> tuple[Tensor, SelectiveSignals]:
    """A Mamba layer at its initialisation: the diagonals (channels, states), and what its scan reads, with w = 1."""
    g = torch.Generator().manual_seed(seed)
    x, dt = normal(batch, length, channels, generator=g), time_steps(channels, g)
    mix, to_B, to_C = (normal(channels, width, generator=g) / channels**0.5 for width in (channels, states, states))
    A = -torch.arange(1.0, states + 1, dtype=torch.float64).expand(channels, -1)
    signals = SelectiveSignals(x, softplus(dt + x @ mix / 2), x @ to_B, x @ to_C, torch.ones_like(x))
    return A, signals


def ssd_layer(
    seed: int = 0,
    *,
    states: int = 8,
    heads: int = 4,
    head_dim: int = 3,
    groups: int = 2,
    batch: int = 3,
    length: int = 24,
) -> tuple[Tensor, SSDSignals]:
    """A Mamba-2 layer with weights on its outputs: the decay rates (heads,), and what its scan reads. B and C are
    independent of each other, and their states differ in size and are correlated."""
    g = torch.Generator().manual_seed(seed)
    x = normal(batch, length, heads, head_dim, generator=g)
    dt = softplus(time_steps(heads, g) + normal(batch, length, heads, generator=g))
    mixes = normal(2, groups, states, states, generator=g) * torch.linspace(0, -2, states).exp()
    B, C = (torch.einsum("gnm,blgm->blgn", mix, normal(batch, length, groups, states, generator=g)) for mix in mixes)
    A = -torch.arange(1.0, heads + 1, dtype=torch.float64)
    return A, SSDSignals(x, dt, B, C, normal(batch, length, heads, head_dim, generator=g).square())


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def time_steps(count: int, generator: torch.Generator) -> Tensor:
    """Mamba's initial biases of the time steps, log-uniform between 0.001 and 0.1 after the softplus."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    dt = torch.exp(math.log(0.001) + uniform * math.log(100))
    return dt + torch.log(-torch.expm1(-dt))


def rows(signals, part: slice):
    """The signals of some of the sequences."""
    names = [name for name in signals.__dataclass_fields__ if name != "mask"]
    mask = None if signals.mask is None else signals.mask[part]
    return type(signals)(*(getattr(signals, name)[part] for name in names), mask)


def padded(signals, left: int, right: int):
    """The same sequences between padding that is full of large numbers."""
    names = [name for name in signals.__dataclass_fields__ if name != "mask"]
    parts = []
    for name in names:
        part = getattr(signals, name)
        pads = [part.new_full((part.shape[0], size, *part.shape[2:]), 7.0) for size in (left, right)]
        parts.append(torch.cat([pads[0], part, pads[1]], 1))
    batch, length = signals.B.shape[:2]
    mask = torch.zeros(batch, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    return type(signals)(*parts, mask)


def all_states(A: Tensor, signals: SelectiveSignals) -> Tensor:
    """(batch, L, D, n), by the recursion as it is written."""
    s = signals
    h = torch.zeros(s.u.shape[0], s.u.shape[2], A.shape[1], dtype=s.u.dtype)
    states = []
    for t in range(s.u.shape[1]):
        h = torch.exp(s.delta[:, t, :, None] * A) * h + (s.delta * s.u)[:, t, :, None] * s.B[:, t, None]
        states.append(h)
    return torch.stack(states, 1)


def all_ssd_states(A: Tensor, signals: SSDSignals) -> Tensor:
    """(batch, L, H, P, n), by the recursion as it is written."""
    s = signals
    batch, length, heads, head_dim = s.x.shape
    B = s.B.repeat_interleave(heads // s.groups, 2)
    h = torch.zeros(batch, heads, head_dim, B.shape[-1], dtype=s.x.dtype)
    states = []
    for t in range(length):
        decay = torch.exp(s.dt[:, t] * A)[..., None, None]
        h = decay * h + (s.dt[:, t, :, None] * s.x[:, t])[..., None] * B[:, t, :, None]
        states.append(h)
    return torch.stack(states, 1)
