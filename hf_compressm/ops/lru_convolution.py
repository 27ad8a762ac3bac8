r"""A MIMO state space model as a convolution, from no state: for few inputs and outputs, where that is faster.

$$y_t = \sum_{k=0}^{t} K_k u_{t-k}, \qquad K_k = \mathrm{Re}(C\, \mathrm{diag}(\lambda)^k B)$$

by fast Fourier transforms of twice the length (Gu et al., "Efficiently Modeling Long Sequences with Structured State
Spaces", arXiv 2111.00396, section 3.3, with the kernel of a diagonal state matrix written out). No state is ever
computed; the cost hardly depends on the batch.

Shapes and arguments as in `lru.py`, with `lam (N, 2)`, `w_in (2 N, H)` and `w_out (P, 2 N)` interleaved as there.
"""

import math

import torch

# Nanoseconds per unit of work, forward and backward, measured and fitted by `python -m benchmarks lru_cost` on one
# thread of an x86-64 CPU. What counts is their relation: a machine twice as fast chooses the same.
CONVOLUTION_COST = {"transforms": 0.94, "products": 0.28, "kernel": 0.35, "powers": 30.0}
RECURRENCE_COST = {"states": 12.0, "products": 0.13, "steps": 9700.0}


def convolution_work(batch: int, length: int, n: int, width: int, p: int) -> dict[str, float]:
    """How much of what the convolution does, by the names of `CONVOLUTION_COST`."""
    size = 2 * length + 1  # about that of the transforms, whose search would recompile for each length
    return {
        "transforms": (batch * (width + p) + width * p) * size * math.log2(size),
        "products": size * batch * width * p,
        "kernel": width * p * n * length,
        "powers": n * length,
    }


def recurrence_work(batch: int, length: int, n: int, width: int, p: int) -> dict[str, float]:
    """How much of what the recurrence does, by the names of `RECURRENCE_COST`."""
    return {"states": batch * length * n, "products": batch * length * n * (width + p), "steps": length}


def convolution_is_faster(*sizes: int) -> bool:
    """Whether the convolution should take less time than the recurrence; `sizes`: batch, length, N, H and P."""
    cost = sum(CONVOLUTION_COST[name] * work for name, work in convolution_work(*sizes).items())
    return cost < sum(RECURRENCE_COST[name] * work for name, work in recurrence_work(*sizes).items())


def transform_size(length: int) -> int:
    """The least number of at least `2 length - 1` without a prime factor above 5, for which transforms are fast."""
    size = max(1, 2 * length - 1)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def _powers(lam: torch.Tensor, length: int) -> torch.Tensor:
    """`lam^0 ... lam^(length - 1)` as real and imaginary parts (2, N, length).

    Doubling: each power is a product of few factors, and the factors are computed in double precision.
    """
    factor = torch.view_as_complex(lam.double())[:, None]
    powers = torch.ones(lam.shape[0], 1, dtype=torch.complex128 if lam.dtype == torch.float64 else torch.complex64)
    powers = powers.to(lam.device)
    while powers.shape[1] < length:
        powers = torch.cat([powers, powers * factor.to(powers.dtype)], 1)
        factor = factor * factor
    powers = powers[:, :length]
    return torch.stack([powers.real, powers.imag])


def _spectra(x: torch.Tensor, size: int) -> torch.Tensor:
    """Transforms over time of `x (batch, L, d)`: (frequencies, batch, d)."""
    return torch.fft.rfft(x.mT.contiguous(), size).permute(2, 0, 1).contiguous()


def _signals(spectra: torch.Tensor, size: int, length: int) -> torch.Tensor:
    """The reverse of `_spectra`: the first `length` steps, (batch, d, L)."""
    return torch.fft.irfft(spectra.permute(1, 2, 0).contiguous(), size)[..., :length]


class _Kernel:
    """The impulse response and what its gradient needs.

    Conjugates are computed at once: the lazy ones of PyTorch are silently dropped in a compiled graph.
    """

    def __init__(self, lam: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, length: int):
        self.B = torch.complex(*w_in.unflatten(0, (-1, 2)).unbind(1))  # (N, H)
        C_re, minus_C_im = w_out.unflatten(1, (-1, 2)).unbind(2)
        self.C = torch.complex(C_re, -minus_C_im)  # (P, N)
        self.powers = _powers(lam, length)  # (2, N, L)
        pairs = self.C[:, None] * self.B.t()  # C_pn B_nh: (P, H, N)
        self.weights = torch.cat([pairs.real, -pairs.imag], -1)  # (P, H, 2 N)
        self.size = transform_size(length)
        response = (self.weights.flatten(0, 1) @ self.powers.flatten(0, 1)).view(*self.weights.shape[:2], length)
        self.spectra = _spectra(response.mT, self.size)  # (frequencies, P, H)

    def gradients(self, dresponse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of lam, w_in and w_out from that of the impulse response (P, H, L)."""
        p, width, length = dresponse.shape
        dresponse = dresponse.reshape(p * width, length)
        dweights = (dresponse @ self.powers.flatten(0, 1).t()).view(self.weights.shape)
        dre, minus_dim = dweights.unflatten(2, (2, -1)).unbind(2)
        dpairs = torch.complex(dre, -minus_dim)
        dC = (dpairs * self.B.t().conj_physical()).sum(1)
        dB = (dpairs * self.C[:, None].conj_physical()).sum(0).t()
        # of lam^k, times k conj(lam^(k - 1))
        dpowers = (self.weights.flatten(0, 1).t() @ dresponse).view(self.powers.shape)
        k = torch.arange(length, dtype=dpowers.dtype, device=dpowers.device)
        dre, dim = dpowers[..., 1:] * k[1:]
        re, im = self.powers[..., :-1]
        dlam = torch.stack([(dre * re + dim * im).sum(-1), (dim * re - dre * im).sum(-1)], -1)
        dw_in = torch.view_as_real(dB).mT.flatten(0, 1)
        dw_out = torch.view_as_real(dC.conj_physical()).flatten(1, 2)
        return dlam, dw_in.contiguous(), dw_out.contiguous()


def convolve(
    u: torch.Tensor, lam: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Outputs y (batch, L, P) of the recurrence from no state; where `mask (batch, L)` is False it stands still."""
    if mask is None:
        return _convolve(u, lam, w_in, w_out)
    # Convolve the real steps of each row alone, moved to its front; each step reads the last real one before it.
    order = mask.logical_not().byte().argsort(dim=1, stable=True)[..., None]
    y = _convolve(u.masked_fill(~mask[..., None], 0).gather(1, order.expand_as(u)), lam, w_in, w_out)
    last = mask.cumsum(1)[..., None] - 1
    return y.gather(1, last.clamp(min=0).expand_as(y)).masked_fill(last < 0, 0)


@torch.library.custom_op("hf_compressm::lru_convolution", mutates_args=())
def _convolve(u: torch.Tensor, lam: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        kernel = _Kernel(lam, w_in, w_out, length)
        y = torch.bmm(_spectra(u.to(lam.dtype), kernel.size), kernel.spectra.mT)
        return _signals(y, kernel.size, length).mT.to(u.dtype).contiguous()


@_convolve.register_fake
def _convolve_fake(u, lam, w_in, w_out):
    return u.new_empty(*u.shape[:2], w_out.shape[0])


@torch.library.custom_op("hf_compressm::lru_convolution_backward", mutates_args=())
def _backward_pass(
    dy: torch.Tensor, u: torch.Tensor, lam: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, lam, w_in and w_out."""
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        kernel = _Kernel(lam, w_in, w_out, length)
        dy_spectra = _spectra(dy.to(lam.dtype), kernel.size)
        du = _signals(torch.bmm(dy_spectra, kernel.spectra.conj_physical()), kernel.size, length).mT
        du = du.to(u.dtype).contiguous()
        dkernel = torch.bmm(
            dy_spectra.mT, _spectra(u.to(lam.dtype), kernel.size).conj_physical()
        )  # (frequencies, P, H)
        return du, *kernel.gradients(_signals(dkernel, kernel.size, length))


@_backward_pass.register_fake
def _backward_pass_fake(dy, u, lam, w_in, w_out):
    return tuple(x.new_empty(x.shape) for x in (u, lam, w_in, w_out))


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_convolve.register_autograd(lambda ctx, dy: _backward_pass(dy, *ctx.saved_tensors), setup_context=_save_for_backward)
