"""Linear time-invariant systems, in the convention of the LRU layer.

The state enters the output after the input has entered the state::

    h_t = A h_{t-1} + B u_t,    y_t = C h_t

so that the impulse response is `C A^k B` for `k = 0, 1, ...` and the transfer function is
`G(z) = sum_k C A^k B z^{-k} = C (I - A/z)^{-1} B`. Textbooks let `h_{t-1}` enter the output; their transfer function
is this one delayed by one step, and both have the same Gramians, Hankel singular values and error norms.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class IllConditioned(ArithmeticError):
    """The system as given, or every reduction that was tried, cannot be computed with in float64."""


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself where it has float64, the CPU where it has none (Apple's MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def promote(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy of `tensor` as `dtype` on a device that has float64; no copy where none is needed."""
    # Two steps: on a device without float64 the tensor must leave before it is widened.
    return tensor.detach().to(float64_device(tensor.device)).to(dtype)


@dataclass(frozen=True)
class StateSpace:
    """A dense discrete-time system `h_t = A h_{t-1} + B u_t`, `y_t = C h_t`, real or complex.

    Shapes: `A` (..., n, n), `B` (..., n, m), `C` (..., p, n).
    """

    A: Tensor
    B: Tensor
    C: Tensor

    @property
    def order(self) -> int:
        return self.A.shape[-1]

    @property
    def spectral_radius(self) -> Tensor:
        """Largest modulus of the eigenvalues of `A`, shape (...)."""
        return torch.linalg.eigvals(self.A).abs().amax(-1)

    def transfer_function(self, z: Tensor) -> Tensor:
        """`G(z) = C (I - A/z)^{-1} B` of an unbatched system at the points `z` (k,): complex, shape (k, p, m)."""
        A, B, C = (matrix.to(torch.complex128) for matrix in (self.A, self.B, self.C))
        identity = torch.eye(self.order, dtype=A.dtype, device=A.device)
        z = z.to(dtype=A.dtype, device=A.device)
        # Blocks of points keep the stack of n x n matrices within some 64 MB.
        points = max(1, 2**22 // max(1, self.order**2))
        return torch.cat([C @ torch.linalg.solve(identity - A / block[:, None, None], B) for block in z.split(points)])


@dataclass(frozen=True)
class DiagonalSystem:
    """A diagonal complex system with a real output: `h_t = lam * h_{t-1} + B u_t`, `y_t = Re(C h_t)`.

    Shapes: `lam` (..., n), `B` (..., n, m), `C` (..., p, n). Whatever comes in is detached and held as complex128,
    on the CPU where the tensors' device has no float64.

    Raises:
        ValueError: if the shapes do not fit each other.
    """

    lam: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self):
        n = self.lam.shape[-1] if self.lam.ndim else 0
        fits = n > 0 and self.B.ndim > 1 and self.C.ndim > 1 and self.B.shape[-2] == n and self.C.shape[-1] == n
        if not fits:
            raise ValueError(
                "A diagonal system needs lam (..., n), B (..., n, m) and C (..., p, n) with one n >= 1; found "
                f"{tuple(self.lam.shape)}, {tuple(self.B.shape)} and {tuple(self.C.shape)}."
            )
        for name in ("lam", "B", "C"):
            object.__setattr__(self, name, promote(getattr(self, name), torch.complex128))

    @property
    def order(self) -> int:
        """Number of complex states."""
        return self.lam.shape[-1]

    def complex(self) -> StateSpace:
        """The complex system of order n whose output's real part is taken: `(diag(lam), B, C)`."""
        return StateSpace(torch.diag_embed(self.lam), self.B, self.C)

    def real(self) -> StateSpace:
        """The real system of order 2n with state `[Re h; Im h]` and the same real output."""
        A = real_embedding(torch.diag_embed(self.lam))
        return StateSpace(A, torch.cat([self.B.real, self.B.imag], -2), torch.cat([self.C.real, -self.C.imag], -1))

    def transfer_function(self, z: Tensor) -> Tensor:
        """Transfer function `(G(z) + conj(G(conj z))) / 2` of the real map at `z` (k,), shape (..., k, p, m)."""

        def modal(points: Tensor) -> Tensor:
            gains = 1 / (1 - self.lam[..., None, :] / points[:, None])
            return (self.C[..., None, :, :] * gains[..., None, :]) @ self.B[..., None, :, :]

        z = z.to(dtype=self.lam.dtype, device=self.lam.device)
        return (modal(z) + modal(z.conj()).conj()) / 2


def real_embedding(matrix: Tensor) -> Tensor:
    """The real matrix `[[Re, -Im], [Im, Re]]` that acts on `[Re x; Im x]` as the complex matrix acts on `x`."""
    return torch.cat(
        [torch.cat([matrix.real, -matrix.imag], -1), torch.cat([matrix.imag, matrix.real], -1)],
        -2,
    )
