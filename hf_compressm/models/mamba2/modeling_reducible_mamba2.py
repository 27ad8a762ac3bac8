"""Mamba-2 (SSD) with a state size per layer: the stock model of transformers, with mixers that can be resized."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_func_from_hub_with_fallback, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2Model,
    Mamba2Output,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
    causal_conv1d_fn,
    mamba2_split_conv1d_scan_combined,
)

from ...ops import ssd_scan
from ...surgery.parameters import resize_parameter_
from ..causal_conv import causal_convolution
from ..generation import ChunkedPrefillMixin, padding_mask, refuse_cache_while_checkpointing
from ..loading import CheckedLoadingMixin
from ..per_layer import set_layer_state_size
from ..resizing import resize_rows_
from ..weight_decay import NoWeightDecayMixin
from .configuration_reducible_mamba2 import ReducibleMamba2Config

# Time steps before the softplus of padding: the step after it is exactly 0, which leaves the state as it is.
_NO_STEP = -1e4


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    initial_states: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan with its surroundings, as `mamba_ssm.mamba_chunk_scan_combined` does it (its names and layout).

    Args:
        x: (batch, L, heads, head_dim), the input.
        dt: (batch, L, heads), the time step before bias, softplus and `dt_limit`.
        A, D, dt_bias: (heads,), A negative.
        B, C: (batch, L, groups, n).
        dt_limit: the smallest and the largest time step.
        initial_states: (batch, heads, head_dim, n), the state before the first step; None is zero.
        mask: (batch, L), bool, False where the state stays as it is.
        kwargs: options of the kernel that are always on here, or that only concern its speed.

    Returns:
        y (batch, L, heads, head_dim) and the last state (batch, heads, head_dim, n).
    """
    dt = F.softplus(dt.to(A.dtype) + dt_bias).clamp(*dt_limit)
    y, state = ssd_scan(x, dt, A, B, C, h0=initial_states, mask=mask)
    return y + D[:, None] * x, state


# transformers gives the kernel of mamba-ssm or of the Hub where there is one, and `scan` otherwise.
scan_kernel = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")(scan)


@use_kernelized_func([scan_kernel])
class ReducibleMamba2Mixer(NoWeightDecayMixin, Mamba2Mixer):
    r"""A stock Mamba-2 mixer whose state size is that of its layer, and can change in place.

    With `conv_state_size` in the config of its layer, it has two maps per group g after convolution and SiLU, where
    they cannot be folded into other weights: the scan runs on `B_map[g] @ B_t` and `C_map[g] @ C_t`. Both are
    `(n_groups, state_size, conv_state_size)`; without `conv_state_size` they are None, and the mixer is the stock one.

    On the CPU, and where transformers finds no kernel, the scan is `hf_compressm.ops.ssd_scan`. Other than in the
    stock mixer padding at any place changes no state, and `time_step_limit` holds for single tokens too.
    """

    no_weight_decay = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, config: ReducibleMamba2Config, layer_idx: int, initialize_mixer_weights: bool = True):
        layer = copy.copy(config.per_layer_config[layer_idx])
        n, channels = layer.state_size, layer.conv_state_size
        layer.state_size = n if channels is None else channels
        super().__init__(layer, layer_idx, initialize_mixer_weights=False)
        self.config = config
        self.ssm_state_size, self.conv_state_size = n, channels
        for name in ("B_map", "C_map"):
            map_ = None if channels is None else nn.Parameter(torch.empty(self.n_groups, n, channels))
            self.register_parameter(name, map_)
        if initialize_mixer_weights and self.dt_bias.device.type != "meta":
            self.init_mamba2_weights()

    @property
    def state_size(self) -> int:
        return self.ssm_state_size

    @property
    def conv_channels(self) -> int:
        """Channels per group that the convolution has for B, and for C."""
        return self.state_size if self.conv_state_size is None else self.conv_state_size

    @torch.no_grad()
    def init_mamba2_weights(self) -> None:
        super().init_mamba2_weights()
        for map_ in (self.B_map, self.C_map):
            if map_ is not None:
                init.copy_(map_, torch.eye(*map_.shape[1:], device=map_.device).expand_as(map_))

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`hidden_states (batch, L, hidden_size)`, `token_mask (batch, L)` 0 at padding, or None.

        `attention_mask` is the stock model's name for it, which that model leaves out for a single token.
        """
        mask = attention_mask if token_mask is None else token_mask
        mask = None if mask is None else mask.bool()
        length = hidden_states.shape[1]
        on_cpu = hidden_states.device.type == "cpu"
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        one_more = state is not None and length == 1
        use_stock = not on_cpu and mask is None and self.B_map is None
        if use_stock and one_more and tuple(self.time_step_limit) == (0.0, math.inf):
            return super().forward(hidden_states, cache=cache, **kwargs)
        projected = self.in_proj(hidden_states)
        if use_stock and self.training and cache is None:
            fused = self._fused(projected, **kwargs)
            if fused is not None:
                return fused

        if packed := [name for name in ("seq_idx", "cu_seqlens") if kwargs.get(name) is not None]:
            raise ValueError(
                f"expected no packed sequences, found {packed[0]}: only the fused training kernel of mamba-ssm keeps "
                "them apart, on a GPU, in layers without maps and in batches without padding"
            )
        gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        xBC = causal_convolution(self, xBC.transpose(1, 2), mask, cache, causal_conv1d_fn)
        x, B, C = self._split(xBC.transpose(1, 2))
        if mask is not None:
            dt = dt.masked_fill(~mask[..., None], _NO_STEP)

        # The kernel knows no mask: a lower limit would give padding a time step again.
        if on_cpu or one_more or (mask is not None and self.time_step_limit[0] > 0):
            run, options = scan, {"mask": mask}
        else:
            run = scan_kernel
            options = {"chunk_size": self.chunk_size, "dt_softplus": True, "return_final_states": True}
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the cache changes in place, and the backward pass needs the old state
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        y, state = run(
            x,
            dt,
            -torch.exp(self.A_log.to(wide)),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=tuple(self.time_step_limit),
            initial_states=state,
            **options,
        )
        if cache is not None:
            cache.update_recurrent_state(state.detach(), self.layer_idx)
        return self.out_proj(self.norm(y.flatten(2), gate).to(hidden_states.dtype))

    def _split(self, xBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, L, conv_dim) -> x (batch, L, heads, head_dim), and B and C (batch, L, groups, state_size)."""
        channels = self.n_groups * self.conv_channels
        x, B, C = xBC.split([self.intermediate_size, channels, channels], dim=-1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.conv_channels)) for t in (B, C))
        if self.B_map is None:
            return x, B, C
        B, C = (torch.einsum("grn,blgn->blgr", map_, t) for map_, t in ((self.B_map, B), (self.C_map, C)))
        return x, B, C

    def _fused(self, projected: torch.Tensor, **kwargs) -> torch.Tensor | None:
        """All after `in_proj`, maps excepted, in one training kernel; None where transformers finds none."""
        return mamba2_split_conv1d_scan_combined(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.float()),
            D=self.D,
            chunk_size=self.chunk_size,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.variance_epsilon,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.head_dim,
            ngroups=self.n_groups,
            norm_before_gate=False,
            return_final_states=False,
            dt_limit=tuple(self.time_step_limit),
            **kwargs,
        )

    def resize_state(self, n: int, conv_state_size: int | None = None) -> None:
        """Change the state size to `n` in place; what belongs to the state is zero then, to be overwritten.

        Without maps, `in_proj` (rows for gate, x, B, C and time step, in this order) and `conv1d` (channels for x, B
        and C) get n rows per group for B and for C. With maps, these become (n_groups, n, conv_state_size), and the
        rest stays. Every `Parameter` stays the same object with its attributes, the gradient of what changes is
        dropped, and the config that the layers share is brought up to date. Optimizer state is the caller's to change.

        Args:
            n: the new state size.
            conv_state_size: give the layer maps from that many channels per group, as new parameters if it has none
                yet; None: keep its maps if it has any.

        Raises:
            ValueError: `n` is below 1 or above the number of channels.
        """
        self._resize(n, self.conv_state_size if conv_state_size is None else conv_state_size)

    def _resize(self, n: int, conv_state_size: int | None) -> None:
        """To these sizes; None: without maps."""
        if conv_state_size is not None and n > conv_state_size:
            raise ValueError(f"expected a state size of at most conv_state_size={conv_state_size}, found {n}")
        set_layer_state_size(self.config, self.layer_idx, n, conv_state_size=conv_state_size)
        channels = n if conv_state_size is None else conv_state_size
        if channels != self.conv_channels:
            self._resize_channels(2 * self.n_groups * channels)
        for name in ("B_map", "C_map"):
            if conv_state_size is None:
                self.register_parameter(name, None)
            elif (map_ := getattr(self, name)) is None:
                zeros = self.in_proj.weight.new_zeros(self.n_groups, n, conv_state_size)
                self.register_parameter(name, nn.Parameter(zeros, requires_grad=self.in_proj.weight.requires_grad))
            else:
                resize_parameter_(map_, map_.new_zeros(self.n_groups, n, conv_state_size))
        self.ssm_state_size, self.conv_state_size = n, conv_state_size

    def _resize_channels(self, new: int) -> None:
        """Give B and C together `new` channels."""
        for name, first, last in self._rows_around_channels():
            resize_rows_(self.get_parameter(name), first=first, new=new, last=last)
        self.conv_dim = self.intermediate_size + new
        self.in_proj.out_features = self.intermediate_size + self.conv_dim + self.num_heads
        self.conv1d.in_channels = self.conv1d.out_channels = self.conv1d.groups = self.conv_dim

    def _rows_around_channels(self) -> list[tuple[str, int, int]]:
        """The parameters with rows for B and C, and how many other rows stand before and after these."""
        rows = {"in_proj": (2 * self.intermediate_size, self.num_heads), "conv1d": (self.intermediate_size, 0)}
        names = [f"{module}.{kind}" for module in rows for kind in ("weight", "bias")]
        own = dict(self.named_parameters())
        return [(name, *rows[name.partition(".")[0]]) for name in names if name in own]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args, **kwargs) -> None:
        # A checkpoint written after a reduction, or before one, has other sizes, and maps or none. Tensors that
        # disagree with each other, or in any other dimension, are left to the ordinary error.
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        sizes = self._sizes_of(own)
        if sizes is not None and sizes != (self.state_size, self.conv_state_size):
            self._resize(*sizes)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _sizes_of(self, state: dict[str, torch.Tensor]) -> tuple[int, int | None] | None:
        """The sizes that `state`, of the whole mixer or of a part of it, was saved with; None if it does not tell."""
        channels, states = set(), set()
        for name, first, last in self._rows_around_channels():
            if (value := state.get(name)) is not None:
                found, rest = divmod(value.shape[0] - first - last, 2 * self.n_groups)
                fits = not rest and value.shape[1:] == self.get_parameter(name).shape[1:]
                channels.add(found if fits else 0)
        for name in ("B_map", "C_map"):
            if (value := state.get(name)) is not None:
                fits = value.dim() == 3 and value.shape[0] == self.n_groups
                channels.add(value.shape[2] if fits else 0)
                states.add(value.shape[1] if fits else 0)
        if len(channels) != 1 or len(states) > 1 or min(channels | states) < 1:
            return None
        (width,) = channels
        if states:
            (n,) = states
            return (n, width) if n <= width else None
        # A part of a checkpoint may have the maps in another part; they stay until something contradicts them.
        whole = {name for name, _ in self.named_parameters()} - {"B_map", "C_map"} <= state.keys()
        return (width, None) if whole or width != self.conv_state_size else None

    def extra_repr(self) -> str:
        maps = "" if self.conv_state_size is None else f", conv_state_size={self.conv_state_size}"
        return f"state_size={self.state_size}{maps}"


class ReducibleMamba2Block(Mamba2Block):
    """A stock block around a mixer with the state size of its layer."""

    def __init__(self, config: ReducibleMamba2Config, layer_idx: int):
        super().__init__(config.per_layer_config[layer_idx], layer_idx)
        self.config = config
        self.mixer = ReducibleMamba2Mixer(config, layer_idx, initialize_mixer_weights=False)


class ReducibleMamba2PreTrainedModel(CheckedLoadingMixin, Mamba2PreTrainedModel):
    """Initialisation as in the stock model, and loading."""

    config: ReducibleMamba2Config
    config_class = ReducibleMamba2Config
    _no_split_modules = ["ReducibleMamba2Block"]


class ReducibleMamba2Model(ReducibleMamba2PreTrainedModel, Mamba2Model):
    """Embedding, blocks and a final norm."""

    def __init__(self, config: ReducibleMamba2Config):
        # Not Mamba2Model's, whose blocks read the one state size that a config with unequal ones does not have.
        super(Mamba2Model, self).__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ReducibleMamba2Block(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm_f = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
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
    ) -> tuple | Mamba2Output:
        """As the stock model's; `attention_mask` may be longer than the input when there is a cache.

        Raises:
            ValueError: a mask that does not fit, or `cache` together with gradient checkpointing.
        """
        refuse_cache_while_checkpointing(self, cache)
        values = input_ids if inputs_embeds is None else inputs_embeds
        mask = padding_mask(attention_mask, values, has_cache=cache is not None)
        # The stock model would drop the mask of a single token, which may be padding when a prompt comes in pieces.
        return super().forward(input_ids, inputs_embeds, cache, token_mask=mask, **kwargs)


class ReducibleMamba2ForCausalLM(ReducibleMamba2PreTrainedModel, ChunkedPrefillMixin, Mamba2ForCausalLM):
    """Mamba-2 with a language modelling head. Checkpoints of the stock `Mamba2ForCausalLM` load as they are."""

    def __init__(self, config: ReducibleMamba2Config):
        super(Mamba2ForCausalLM, self).__init__(config)
        self.backbone = ReducibleMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = [
    "ReducibleMamba2ForCausalLM",
    "ReducibleMamba2Mixer",
    "ReducibleMamba2Model",
    "ReducibleMamba2PreTrainedModel",
]
