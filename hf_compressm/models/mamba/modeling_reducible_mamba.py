"""Mamba (S6) with a state size per layer: the stock model of transformers, with mixers that can be resized."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_func_from_hub_with_fallback, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba.modeling_mamba import (
    MambaBlock,
    MambaForCausalLM,
    MambaMixer,
    MambaModel,
    MambaOutput,
    MambaPreTrainedModel,
    MambaRMSNorm,
    causal_conv1d_fn,
    mamba_inner_fn,
)

from ...ops import gated_scan
from ...surgery.parameters import resize_parameter_
from ..causal_conv import causal_convolution
from ..generation import ChunkedPrefillMixin, padding_mask, refuse_cache_while_checkpointing
from ..loading import CheckedLoadingMixin
from ..per_layer import set_layer_state_size
from ..resizing import resize_rows_
from ..weight_decay import NoWeightDecayMixin
from .configuration_reducible_mamba import ReducibleMambaConfig

# Time steps before the softplus of padding: the step after it is exactly 0, which leaves the state as it is.
_NO_STEP = -1e4


def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    h0: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective scan with its surroundings, as `mamba_ssm.selective_scan_fn` does it (its names and layout).

    Args:
        u, delta, z: (batch, channels, L), input, time step before bias and softplus, and gate before its SiLU.
        A: (channels, n), negative.
        B, C: (batch, n, L).
        D, delta_bias: (channels,).
        h0: (batch, channels, n), the state before the first step; None is zero.
        kwargs: options of the kernel that are always on here.

    Returns:
        y (batch, channels, L) and the last state (batch, channels, n).
    """
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    y, state = gated_scan(u, delta, A, B, C, D, z, delta_bias, h0)
    return y.transpose(1, 2), state


# transformers gives the kernel of mamba-ssm or of the Hub where there is one, and `scan` otherwise.
scan_kernel = use_kernel_func_from_hub_with_fallback("selective_scan_fn", "mamba_ssm")(scan)


@use_kernelized_func([scan_kernel])
class ReducibleMambaMixer(NoWeightDecayMixin, MambaMixer):
    """A stock Mamba mixer whose state size is that of its layer, and can change in place.

    On the CPU, and where transformers finds no kernel, the scan is `hf_compressm.ops.gated_scan`. Other than the
    stock mixer it goes on from a cache with any number of tokens, and padding at any place changes no state.
    """

    no_weight_decay = frozenset({"A_log", "D"})

    def __init__(self, config: ReducibleMambaConfig, layer_idx: int, initialize_mixer_weights: bool = True):
        super().__init__(config.per_layer_config[layer_idx], layer_idx, initialize_mixer_weights)
        self.config = config

    @property
    def state_size(self) -> int:
        return self.ssm_state_size

    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`hidden_states (batch, L, hidden_size)`, `attention_mask (batch, L)` 0 at padding, or None."""
        mask = None if attention_mask is None else attention_mask.bool()
        on_cpu = hidden_states.device.type == "cpu"
        h0 = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        use_kernels = not on_cpu and mask is None
        if use_kernels and h0 is not None and hidden_states.shape[1] == 1:
            return super().forward(hidden_states, cache=cache)
        xz = self.in_proj(hidden_states).transpose(1, 2)
        if use_kernels and self.training and cache is None and (fused := self._fused(xz)) is not None:
            return fused

        x, z = xz.chunk(2, dim=1)
        x = causal_convolution(self, x, mask, cache, causal_conv1d_fn)
        sizes = [self.time_step_rank, self.state_size, self.state_size]
        delta, B, C = self.x_proj(x.transpose(1, 2)).split(sizes, dim=-1)
        delta = F.linear(delta, self.dt_proj.weight).transpose(1, 2)
        if mask is not None:
            delta = delta.masked_fill(~mask[:, None], _NO_STEP)

        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        if on_cpu or h0 is not None:
            # No kernel goes on from a state. The cache changes in place, and the backward pass needs the old state.
            run, options = scan, {"h0": h0.clone() if h0 is not None and torch.is_grad_enabled() else h0}
        else:
            run, options = scan_kernel, {"delta_softplus": True, "return_last_state": True}
        y, state = run(
            x,
            delta,
            -torch.exp(self.A_log.to(wide)),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D.to(wide),
            z=z,
            delta_bias=self.dt_proj.bias.to(wide),
            **options,
        )
        if cache is not None:
            cache.update_recurrent_state(state.detach(), self.layer_idx)
        return self.out_proj(y.transpose(1, 2).to(hidden_states.dtype))

    def _fused(self, xz: torch.Tensor) -> torch.Tensor | None:
        """All after `in_proj` in one training kernel; None where transformers finds none."""
        return mamba_inner_fn(
            xz,
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            None if self.out_proj.bias is None else self.out_proj.bias.float(),
            -torch.exp(self.A_log.float()),
            None,  # B and C depend on the input
            None,
            self.D.float(),
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )

    def resize_state(self, n: int) -> None:
        """Change the state size to `n` in place; what belongs to the state is zero then, to be overwritten.

        `A_log` becomes (channels, n) and `x_proj` (time_step_rank + 2 n, channels), with its rows for the time step,
        for B and for C in this order. Every `Parameter` stays the same object with its attributes, the gradient of
        these two is dropped, and the config that the layers share is brought up to date. Optimizer state is the
        caller's to change.

        Raises:
            ValueError: `n` is below 1.
        """
        set_layer_state_size(self.config, self.layer_idx, n)
        resize_rows_(self.x_proj.weight, first=self.time_step_rank, new=2 * n)
        self.x_proj.out_features = self.time_step_rank + 2 * n
        resize_parameter_(self.A_log, self.A_log.new_zeros(self.intermediate_size, n))
        self.ssm_state_size = n

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args, **kwargs) -> None:
        # A checkpoint written after a reduction, or before one, has another state size. Tensors that disagree with
        # each other, or in any other dimension, are left to the ordinary error.
        sizes = set()
        if (A_log := state_dict.get(f"{prefix}A_log")) is not None:
            sizes.add(A_log.shape[1] if A_log.dim() == 2 and A_log.shape[0] == self.intermediate_size else None)
        if (weight := state_dict.get(f"{prefix}x_proj.weight")) is not None:
            n, rest = divmod(weight.shape[0] - self.time_step_rank, 2)
            fits = weight.dim() == 2 and weight.shape[1] == self.intermediate_size and not rest
            sizes.add(n if fits else None)
        if len(sizes) == 1 and None not in sizes and (n := sizes.pop()) > 0 and n != self.state_size:
            self.resize_state(n)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"state_size={self.state_size}"


class ReducibleMambaBlock(MambaBlock):
    """A stock block around a mixer with the state size of its layer."""

    def __init__(self, config: ReducibleMambaConfig, layer_idx: int):
        super().__init__(config.per_layer_config[layer_idx], layer_idx)
        self.config = config
        self.mixer = ReducibleMambaMixer(config, layer_idx, initialize_mixer_weights=False)


class ReducibleMambaPreTrainedModel(CheckedLoadingMixin, MambaPreTrainedModel):
    """Initialisation as in the stock model, and loading."""

    config: ReducibleMambaConfig
    config_class = ReducibleMambaConfig
    _no_split_modules = ["ReducibleMambaBlock"]


class ReducibleMambaModel(ReducibleMambaPreTrainedModel, MambaModel):
    """Embedding, blocks and a final norm."""

    def __init__(self, config: ReducibleMambaConfig):
        # Not MambaModel's, whose blocks read the one state size that a config with unequal ones does not have.
        super(MambaModel, self).__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ReducibleMambaBlock(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | MambaOutput:
        """As the stock model's; `attention_mask` may be longer than the input when there is a cache.

        Raises:
            ValueError: a mask that does not fit, or `cache` together with gradient checkpointing.
        """
        refuse_cache_while_checkpointing(self, cache)
        values = input_ids if inputs_embeds is None else inputs_embeds
        mask = padding_mask(attention_mask, values, has_cache=cache is not None)
        return super().forward(input_ids, inputs_embeds, cache, attention_mask=mask, **kwargs)


def _refuse_packed_sequences(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook, because the stock forward takes any keyword and drops it."""
    if packed := [name for name in ("seq_idx", "cu_seqlens") if kwargs.get(name) is not None]:
        raise ValueError(
            f"expected no packed sequences, found {' and '.join(packed)}: the state would leak from one to the next. "
            "Give each sequence its own row, with padding and an attention_mask"
        )


class ReducibleMambaForCausalLM(ReducibleMambaPreTrainedModel, ChunkedPrefillMixin, MambaForCausalLM):
    """Mamba with a language modelling head. Checkpoints of the stock `MambaForCausalLM` load as they are."""

    def __init__(self, config: ReducibleMambaConfig):
        super(MambaForCausalLM, self).__init__(config)
        self.backbone = ReducibleMambaModel(config)
        self.register_forward_pre_hook(_refuse_packed_sequences, with_kwargs=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = [
    "ReducibleMambaForCausalLM",
    "ReducibleMambaMixer",
    "ReducibleMambaModel",
    "ReducibleMambaPreTrainedModel",
]
