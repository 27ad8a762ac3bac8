"""The MIMO SSM: blocks of a linear recurrent unit (LRU) with a complex diagonal state, and a gated linear unit."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...ops import lru_scan
from ...surgery.parameters import resize_parameter_
from ..generation import ChunkedPrefillMixin, padding_mask, refuse_cache_while_checkpointing
from ..loading import CheckedLoadingMixin
from ..per_layer import set_layer_state_size
from ..weight_decay import NoWeightDecayMixin
from .configuration_mimo_ssm import MimoSSMConfig


@dataclass
class MimoSSMModelOutput(ModelOutput):
    """Output of [`MimoSSMModel`].

    `last_hidden_state (batch, L, hidden_size)`; `cache`: the recurrent state after the last token, to be passed
    to the next call; `hidden_states`: embeddings and the output of each block, the last one normalised.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MimoSSMCausalLMOutput(ModelOutput):
    """Output of [`MimoSSMForCausalLM`]: `logits (batch, L, vocab_size)`, the rest as in [`MimoSSMModelOutput`]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MimoSSMSequenceClassifierOutput(ModelOutput):
    """Output of [`MimoSSMForSequenceClassification`]: `logits (batch, num_labels)`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class LRU(NoWeightDecayMixin, nn.Module):
    r"""Linear recurrent unit.

    $$h_t = \lambda \odot h_{t-1} + \gamma \odot (\hat B u_t), \qquad y_t = \mathrm{Re}(C h_t) + D \odot u_t$$

    with $\lambda = \exp(-\exp(\nu) + i\theta)$ and $\gamma = \sqrt{1 - |\lambda|^2}$, which keeps the state as large
    as its input for any $\lambda$ (Orvieto et al., arXiv 2303.06349, section 3). It is float32 or better.

    Its state size can change in place: `resize_state`, and loading a state dict of another size.
    """

    state_dims = {"nu_log": 0, "theta": 0, "B_re": 0, "B_im": 0, "C_re": 1, "C_im": 1}
    no_weight_decay = frozenset({"nu_log", "theta", "D"})

    def __init__(self, config: MimoSSMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        n, width = config.per_layer_config[layer_idx].state_size, config.hidden_size
        at_least_float32 = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.nu_log = nn.Parameter(torch.empty(n, dtype=at_least_float32))
        self.theta = nn.Parameter(torch.empty(n, dtype=at_least_float32))
        self.B_re = nn.Parameter(torch.empty(n, width))
        self.B_im = nn.Parameter(torch.empty(n, width))
        self.C_re = nn.Parameter(torch.empty(width, n))
        self.C_im = nn.Parameter(torch.empty(width, n))
        self.D = nn.Parameter(torch.empty(width))

    @property
    def state_size(self) -> int:
        return self.nu_log.shape[0]

    def forward(self, u: torch.Tensor, mask: torch.Tensor | None = None, cache: Cache | None = None) -> torch.Tensor:
        """`u (batch, L, hidden_size)`, `mask (batch, L)` False where the state stays as it is; returns y like u."""
        nu = torch.exp(self.nu_log.to(torch.promote_types(self.nu_log.dtype, torch.float32)))
        radius, theta = torch.exp(-nu), self.theta.to(nu.dtype)
        gamma = torch.sqrt(-torch.expm1(-2 * nu))[:, None]
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        y, state = lru_scan(
            u,
            radius * torch.cos(theta),
            radius * torch.sin(theta),
            gamma * self.B_re,
            gamma * self.B_im,
            self.C_re,
            self.C_im,
            h0=state,
            mask=mask,
            final_state=cache is not None,
        )
        if cache is not None:
            self._store_state(cache, state)
        return y + self.D * u

    def _store_state(self, cache: Cache, state: torch.Tensor) -> None:
        cache.update_recurrent_state(state.detach(), self.layer_idx)
        # The cache sets these with a convolution's state, and this layer has none.
        layer = cache.layers[self.layer_idx]
        layer.has_previous_state[0] = True
        layer.dtype, layer.device = state.dtype, state.device

    def resize_state(self, n: int) -> None:
        """Change the state size to `n` in place; the new contents are zero, to be overwritten.

        Every `Parameter` stays the same object with its attributes, its gradient is dropped, and the config that the
        layers share is brought up to date. Optimizer state is the caller's to change.

        Raises:
            ValueError: `n` is below 1.
        """
        set_layer_state_size(self.config, self.layer_idx, n)
        for name, dim in self.state_dims.items():
            param = getattr(self, name)
            shape = list(param.shape)
            shape[dim] = n
            resize_parameter_(param, param.new_zeros(shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args, **kwargs) -> None:
        # A checkpoint written after a reduction, or before one, has another state size. Tensors that disagree with
        # each other, or in any other dimension, are left to the ordinary error.
        sizes = set()
        for name, dim in self.state_dims.items():
            if (tensor := state_dict.get(prefix + name)) is not None:
                own, new = list(getattr(self, name).shape), list(tensor.shape)
                fits = len(own) == len(new) and own[:dim] + own[dim + 1 :] == new[:dim] + new[dim + 1 :]
                sizes.add(new[dim] if fits else None)
        if len(sizes) == 1 and not sizes & {None, 0, self.state_size}:
            self.resize_state(sizes.pop())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"hidden_size={self.D.shape[0]}, state_size={self.state_size}"


class MimoSSMBlock(GradientCheckpointingLayer):
    """Layer norm, LRU, GELU, dropout, gated linear unit, dropout, and the residual connection around them."""

    def __init__(self, config: MimoSSMConfig, layer_idx: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = LRU(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        mixed = self.mixer(self.norm(hidden_states), mask=mask, cache=cache)
        gated = nn.functional.glu(self.gate(self.dropout(nn.functional.gelu(mixed))), dim=-1)
        return hidden_states + self.dropout(gated)


class MimoSSMPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    """Initialisation and loading, common to the models of this file."""

    config: MimoSSMConfig
    config_class = MimoSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["MimoSSMBlock"]
    _keep_in_fp32_modules_strict = ["nu_log", "theta"]
    _can_record_outputs = {"hidden_states": MimoSSMBlock}

    def __init__(self, config: MimoSSMConfig):
        super().__init__(config)
        if config.vocab_size is None:
            self.main_input_name = "input_values"

    def get_input_embeddings(self) -> nn.Module:
        base = self.base_model
        return base.input_proj if base.embed_tokens is None else base.embed_tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LRU):
            self._init_lru(module)

    def _init_lru(self, lru: LRU) -> None:
        """Eigenvalues uniform on the ring r_min <= |lambda| <= r_max (arXiv 2303.06349, lemma 3.2)."""
        inner, outer = self.config.r_min**2, self.config.r_max**2
        eps = torch.finfo(torch.float32).eps
        area = torch.rand(lru.state_size, dtype=torch.float64, device="cpu")  # not every device has float64
        area = (inner + area * (outer - inner)).clamp(eps, 1 - eps)
        init.copy_(lru.nu_log, torch.log(-0.5 * torch.log(area)))
        init.uniform_(lru.theta, 0, self.config.max_phase)
        for weight in (lru.B_re, lru.B_im):
            init.normal_(weight, std=1 / math.sqrt(2 * self.config.hidden_size))
        for weight in (lru.C_re, lru.C_im):
            init.normal_(weight, std=1 / math.sqrt(lru.state_size))
        init.normal_(lru.D)


class MimoSSMModel(MimoSSMPreTrainedModel):
    """Embedding or input projection, the blocks, and a final layer norm."""

    def __init__(self, config: MimoSSMConfig):
        super().__init__(config)
        self.embed_tokens = None if config.vocab_size is None else nn.Embedding(config.vocab_size, config.hidden_size)
        self.input_proj = None if config.input_size is None else nn.Linear(config.input_size, config.hidden_size)
        self.layers = nn.ModuleList([MimoSSMBlock(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MimoSSMModelOutput:
        r"""Run the blocks on exactly one kind of input.

        Args:
            input_ids: (batch, L), for models with a `vocab_size`.
            attention_mask: (batch, L), 0 for padding: it changes no state and no other token. With `cache` it
                may also cover the earlier tokens; its last L columns count.
            inputs_embeds: (batch, L, hidden_size), instead of embedded tokens.
            input_values: (batch, L, input_size), or (batch, L) when `input_size` is 1.
            cache: the states to go on from, as returned by an earlier call; they change in place.
            use_cache: whether to return the states; by default `config.use_cache`, and not in training.

        Raises:
            ValueError: none or several inputs, an input that the config has no size for, a mask that does not fit, or
                `cache` together with gradient checkpointing.
        """
        refuse_cache_while_checkpointing(self, cache)
        if self.gradient_checkpointing and self.training:
            use_cache = False
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        hidden_states, mask = self._embed(input_ids, inputs_embeds, input_values, attention_mask, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask=mask, cache=cache)
        return MimoSSMModelOutput(last_hidden_state=self.norm(hidden_states), cache=cache if use_cache else None)

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings, free of what padding held (NaN included), and the mask of the tokens given now."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "input_values": input_values}
        given = [name for name, value in inputs.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(inputs)}; found {' and '.join(given) or 'none'}")
        if input_ids is not None and self.embed_tokens is None:
            raise ValueError("found input_ids, but the config has no vocab_size: set it, or pass input_values")
        if input_values is not None and self.input_proj is None:
            raise ValueError("found input_values, but the config has no input_size: set it, or pass input_ids")
        values = inputs[given[0]]
        mask = padding_mask(attention_mask, values, has_cache=cache is not None)
        if input_ids is not None:
            return self.embed_tokens(input_ids), mask
        if input_values is not None:
            values = self._with_channels(input_values).to(self.input_proj.weight.dtype)
        if mask is not None:
            values = values.masked_fill(~mask[..., None], 0)
        return (values if input_values is None else self.input_proj(values)), mask

    def _with_channels(self, input_values: torch.Tensor) -> torch.Tensor:
        size = self.config.input_size
        values = input_values.unsqueeze(-1) if input_values.dim() == 2 else input_values
        if values.dim() != 3 or values.shape[-1] != size:
            raise ValueError(
                f"expected input_values of shape (batch, L, {size}){' or (batch, L)' if size == 1 else ''}, "
                f"found {tuple(input_values.shape)}"
            )
        return values


class MimoSSMForCausalLM(MimoSSMPreTrainedModel, ChunkedPrefillMixin, GenerationMixin):
    """The model with a language modelling head; `generate()` carries the recurrent state from token to token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MimoSSMConfig):
        if config.vocab_size is None:
            raise ValueError("a causal language model needs `vocab_size` in its config, found None")
        super().__init__(config)
        self.model = MimoSSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() would create a cache and ask for its length, which recurrent states do not have; so the first
        # forward pass creates it.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MimoSSMCausalLMOutput:
        r"""As [`MimoSSMModel.forward`], and logits.

        Args:
            labels: (batch, L), usually `input_ids` themselves: the shift by one happens inside, -100 is ignored.
            logits_to_keep: compute the logits of the last tokens only (0: all), or of the given positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MimoSSMCausalLMOutput(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )


class MimoSSMForSequenceClassification(MimoSSMPreTrainedModel):
    """The model with a classification or regression head on the mean, or on the last, of the real tokens."""

    def __init__(self, config: MimoSSMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MimoSSMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MimoSSMSequenceClassifierOutput:
        r"""As [`MimoSSMModel.forward`], and logits for the sequence.

        Args:
            labels: (batch,) classes or values, or (batch, num_labels); `config.problem_type` says which loss, and is
                inferred from the first labels when None.
            num_items_in_batch: number of labels over all micro-batches of a step; the loss is then divided by it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            use_cache=False,
            **kwargs,
        )
        logits = self.score(_pool(outputs.last_hidden_state, attention_mask, self.config.pooling))
        loss = None
        if labels is not None:
            pooled = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = self.loss_function(labels=labels, pooled_logits=pooled, logits=pooled, config=self.config)
            if num_items_in_batch is not None:
                # The loss functions take a mean over this micro-batch, and some of them know no other.
                loss = loss * (labels.ne(-100).sum() / num_items_in_batch)
        return MimoSSMSequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def _pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(batch, L, d) -> (batch, d) over the tokens whose mask is not 0; a row without any gives finite values."""
    if attention_mask is None:
        return hidden_states.mean(1) if pooling == "mean" else hidden_states[:, -1]
    mask = attention_mask.bool()
    if pooling == "mean":
        total = hidden_states.masked_fill(~mask[..., None], 0).sum(1)
        return total / mask.sum(1, keepdim=True).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(1)
    return hidden_states[torch.arange(mask.shape[0], device=mask.device), last]


__all__ = [
    "LRU",
    "MimoSSMBlock",
    "MimoSSMCausalLMOutput",
    "MimoSSMForCausalLM",
    "MimoSSMForSequenceClassification",
    "MimoSSMModel",
    "MimoSSMModelOutput",
    "MimoSSMPreTrainedModel",
    "MimoSSMSequenceClassifierOutput",
]
