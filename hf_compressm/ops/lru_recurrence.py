"""The steps of a complex diagonal recurrence and of its adjoint, in place, over one chunk of time.

In PyTorch here, a few small operations per step. A GPU would wait for most of these to be launched; there the class of
the same shape in `_lru_triton.py` runs all steps of a chunk in one kernel, where Triton works.
"""

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


class Recurrence:
    """Buffers of a chunk, and what turns their content into states and adjoints.

    Args:
        lam: (N,), complex.
        states: (steps + 1, batch, N), complex, contiguous; the first is the state before the chunk.
        adjoints: (steps, batch, N), complex, contiguous; for `retreat` only.
    """

    def __init__(self, lam: torch.Tensor, states: torch.Tensor, adjoints: torch.Tensor | None = None):
        self.lam, self.states, self.adjoints = lam, states, adjoints
        self._lam_conj = lam.conj().resolve_conj()
        self._h = states.unbind(0)
        self._g = () if adjoints is None else adjoints.unbind(0)

    def advance(self, steps: int, live: torch.Tensor | None) -> None:
        """Turn `states[1:]`, on entry the input of each step, into the states `h_t = lam h_{t-1} + input_t`.

        Args:
            steps: how many there are to do, at least 1.
            live: (steps, batch), bool, contiguous: False where the state stays as it is; None is True everywhere.
        """
        frozen = _frozen_somewhere(live, steps)
        for k in range(steps):
            before, state = self._h[k], self._h[k + 1]
            state.addcmul_(self.lam, before)
            if frozen[k]:
                state.copy_(torch.where(live[k, :, None], state, before))

    def retreat(self, steps: int, carry: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
        """Turn `adjoints`, on entry what each step's output sends back, into the gradients of the steps' inputs.

        These are `g_t = adjoint_t + conj(lam) g_{t+1}`, and zero where `live` is False.

        Args:
            steps, live: as in `advance`, which has been called.
            carry: (batch, N), complex: the gradient of the state after the chunk, overwritten by that of the state
                before it.

        Returns:
            The gradient of `lam`, (N,): the sum of `conj(h_{t-1}) g_t`.
        """
        frozen = _frozen_somewhere(live, steps)
        self._g[steps - 1].add_(carry)
        carry.zero_()
        for k in reversed(range(steps)):
            g, before = self._g[k], self._g[k - 1] if k else carry
            if frozen[k]:
                before.add_(torch.where(live[k, :, None], self._lam_conj * g, g))
            else:
                before.addcmul_(self._lam_conj, g)
        if live is not None:
            self.adjoints[:steps].masked_fill_(live.logical_not()[..., None], 0)
        return (self.states[:steps].conj() * self.adjoints[:steps]).sum((0, 1))


def _frozen_somewhere(live: torch.Tensor | None, steps: int) -> list[bool]:
    """Steps at which some row stands still: only these pay for the mask."""
    return [False] * steps if live is None else live.all(1).logical_not().tolist()


@cache
def recurrence_on(device: torch.device) -> type:
    """`Recurrence`, or the class of the same shape that is faster on this device."""
    if device.type == "cuda":
        try:
            from . import _lru_triton

            _lru_triton.check(device)
            return _lru_triton.FusedRecurrence
        except torch.OutOfMemoryError:
            raise  # says nothing of Triton; with more room the next call checks again
        except Exception as error:  # Triton needs a C compiler and a GPU that it knows; PyTorch can do without
            logger.warning(
                "Triton cannot be used (%s): the recurrence of MIMO SSM runs step by step in PyTorch, slowly", error
            )
    return Recurrence
