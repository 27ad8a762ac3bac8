"""What all recurrent models of this package share when they run: the mask of padding, and prompts in pieces."""

import torch


def padding_mask(attention_mask: torch.Tensor | None, values: torch.Tensor, has_cache: bool) -> torch.Tensor | None:
    """The boolean mask (batch, L) of the tokens given now, from a mask that may also cover those in the cache.

    Args:
        attention_mask: (batch, L), or longer with a cache: its last L columns count. 0 is padding.
        values: (batch, L, ...), what is given now.
        has_cache: whether earlier tokens are in a cache.

    Returns:
        The mask; None where nothing is padding.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    batch, length = values.shape[:2]
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    longer_is_fine = has_cache and fits and attention_mask.shape[1] >= length
    if not fits or (attention_mask.shape[1] != length and not longer_is_fine):
        raise ValueError(
            f"expected attention_mask of shape {(batch, length)}{' or longer' if has_cache else ''}, "
            f"found {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    # Looking at the values would break a compiled graph.
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def refuse_cache_while_checkpointing(model, cache) -> None:
    """Raise a ValueError when gradient checkpointing would run the recurrences twice on a cache."""
    if cache is not None and model.gradient_checkpointing and model.training:
        raise ValueError(
            "gradient checkpointing would run each recurrence twice on `cache`: "
            "pass no cache, or call gradient_checkpointing_disable()"
        )


class ChunkedPrefillMixin:
    """For a `GenerationMixin` whose cache holds recurrent states only, which have no length."""

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """The prompt in pieces of `prefill_chunk_size`, which transformers offers for caches with a length only."""
        size = generation_config.prefill_chunk_size
        if size is None or model_kwargs.get("inputs_embeds") is not None or not model_kwargs.get("use_cache"):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        attention_mask = model_kwargs.pop("attention_mask", None)
        earlier = 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
        for chunk in input_ids.split(size, dim=1):
            earlier += chunk.shape[1]
            model_kwargs["attention_mask"] = None if attention_mask is None else attention_mask[:, :earlier]
            inputs = self.prepare_inputs_for_generation(chunk, is_first_iteration=is_first_iteration, **model_kwargs)
            outputs = self(**inputs, return_dict=True)
            model_kwargs["cache"] = outputs.cache
        model_kwargs["attention_mask"] = attention_mask
        return outputs
