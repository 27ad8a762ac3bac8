"""Stock Mamba and Mamba-2 models of transformers on the scans of this package, where they run on the CPU."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, apply_mask_to_padding_states

from .models.causal_conv import convolve_and_act
from .models.mamba.modeling_reducible_mamba import scan as mamba_scan
from .models.mamba2.modeling_reducible_mamba2 import scan as mamba2_scan


class _FastMixerMixin:
    """What the two have in common: when the stock forward runs, and the convolution."""

    def _runs_stock(self, hidden_states: torch.Tensor, cache: Cache | None, packed: bool) -> bool:
        """On other devices kernels keep their place, and a single token has no use for a scan."""
        one_more = cache is not None and hidden_states.shape[1] == 1 and self._state(cache) is not None
        return hidden_states.device.type != "cpu" or one_more or packed

    def _state(self, cache: Cache | None) -> torch.Tensor | None:
        return None if cache is None else cache.get_recurrent_state(self.layer_idx, state_idx=0)

    def _convolve(self, x: torch.Tensor, cache: Cache | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Convolution and activation of `x (batch, L, channels)`, as in the stock forward."""
        length = x.shape[1]
        if cache is not None:
            full = cache.update_conv_state(x.mT, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            x = full.mT
        x = convolve_and_act(self, x)[:, -length:]
        return apply_mask_to_padding_states(x, attention_mask)


class FastMambaMixer(_FastMixerMixin, MambaMixer):
    """The stock mixer, with `hf_compressm.ops.gated_scan` on the CPU."""

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        # The stock scan does not go on from a state; what it does instead is its own affair.
        if self._runs_stock(hidden_states, cache, packed=False) or self._state(cache) is not None:
            return super().forward(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        x, z = self.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask)).chunk(2, dim=-1)
        x = self._convolve(x, cache, attention_mask)
        delta, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        y, state = mamba_scan(
            x.mT,
            F.linear(delta, self.dt_proj.weight).mT,
            -torch.exp(self.A_log.float()),
            B.mT,
            C.mT,
            D=self.D.float(),
            z=z.mT,
            delta_bias=self.dt_proj.bias.float(),
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(y.mT.to(hidden_states.dtype))


class FastMamba2Mixer(_FastMixerMixin, Mamba2Mixer):
    """The stock mixer, with `hf_compressm.ops.ssd_scan` on the CPU."""

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        packed = any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seqlens"))  # refused there
        if self._runs_stock(hidden_states, cache, packed):
            return super().forward(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        projected = self.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask))
        gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        groups = self.n_groups * self.ssm_state_size
        x, B, C = self._convolve(xBC, cache, attention_mask).split([self.intermediate_size, groups, groups], dim=-1)
        y, state = mamba2_scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt,
            -torch.exp(self.A_log.float()),
            *(t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=tuple(self.time_step_limit),
            initial_states=self._state(cache),
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(self.norm(y.flatten(2), gate).to(hidden_states.dtype))


_FAST = {MambaMixer: FastMambaMixer, Mamba2Mixer: FastMamba2Mixer}
_STOCK = {fast: stock for stock, fast in _FAST.items()}


class FastScansHandle:
    """Undoes one `use_fast_scans`: by `remove()`, or at the end of a `with` block."""

    def __init__(self, changed: list[tuple[nn.Module, type]]):
        self._changed = changed

    def remove(self) -> None:
        """Give the mixers that were changed their former class back; a second time does nothing."""
        for mixer, former in self._changed:
            mixer.__class__ = former
        self._changed = []

    def __enter__(self) -> "FastScansHandle":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def use_fast_scans(model: nn.Module, enabled: bool = True) -> FastScansHandle:
    """Let the stock Mamba and Mamba-2 mixers in `model` run on the scans of this package while they are on the CPU.

    Results are the same within rounding. The model stays what it was: its weights, its config and what
    `save_pretrained` writes are those of the stock model, copies of it are as fast, and reductions find its mixers. On
    other devices transformers and its kernels do what they always do. Models of this package need no such call.

    Args:
        model: any module with mixers of transformers' `MambaForCausalLM` or `Mamba2ForCausalLM` somewhere in it. No
            other model changes. Subclasses of the mixers have a forward of their own and are left alone.
        enabled: False goes back to the stock scans, in a copy as well.

    Returns:
        A handle whose `remove()` undoes this call; as a context manager it does so at the end.

    Raises:
        ValueError: no such mixer in `model`, or one whose forward has been replaced.

    Example:

    ```python
    >>> from transformers import MambaConfig, MambaForCausalLM

    >>> from hf_compressm import use_fast_scans

    >>> model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1))
    >>> handle = use_fast_scans(model)

    ```
    """
    swap = _FAST if enabled else _STOCK
    mixers = [module for module in model.modules() if isinstance(module, tuple(_FAST))]
    if not mixers:
        raise ValueError(
            f"expected a model with mixers of transformers' Mamba or Mamba-2, found none in {type(model).__name__}"
        )
    changing = [mixer for mixer in mixers if type(mixer) in swap]
    if any("forward" in vars(mixer) for mixer in changing):
        raise ValueError(
            "expected mixers with the forward of their class, found one that was replaced, as device_map and the "
            "kernels of transformers do: call use_fast_scans before"
        )
    changed = [(mixer, type(mixer)) for mixer in changing]
    for mixer, former in changed:
        mixer.__class__ = swap[former]
    return FastScansHandle(changed)
