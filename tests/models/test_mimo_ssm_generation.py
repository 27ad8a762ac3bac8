import pytest
import torch
from transformers import DynamicCache

from hf_compressm.models import MimoSSMModel


def left_padded(tokens, lengths, content=0):
    width = tokens.shape[1]
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return tokens.masked_fill(mask == 0, content), mask


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 6], [10, 1]])
@pytest.mark.parametrize("mask_of", ["none", "new tokens", "all tokens"])
def test_pieces_continue_the_cache(make_lm, tokens, pieces, mask_of):
    model = make_lm()
    tokens, mask = left_padded(tokens, [11, 6, 9]) if mask_of != "none" else (tokens, None)
    whole = model(tokens, attention_mask=mask)
    logits, cache, seen = [], None, 0
    for count in pieces:
        new = slice(seen, seen + count)
        seen += count
        masks = {
            "none": None,
            "new tokens": mask is not None and mask[:, new],
            "all tokens": mask is not None and mask[:, :seen],
        }
        first = mask_of == "all tokens" and cache is None
        out = model(tokens[:, new], attention_mask=mask[:, new] if first else masks[mask_of], cache=cache)
        logits.append(out.logits)
        cache = out.cache
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-5)
    for layer, expected in zip(cache.layers, whole.cache.layers, strict=True):
        torch.testing.assert_close(layer.recurrent_states[0], expected.recurrent_states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [0, 31])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_continuation(make_lm, tokens, side, content):
    model = make_lm()
    filler = torch.full((3, 4), content)
    parts = [filler, tokens] if side == "left" else [tokens, filler]
    masks = [torch.zeros(3, 4), torch.ones(3, 11)] if side == "left" else [torch.ones(3, 11), torch.zeros(3, 4)]
    cache = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1)).cache
    following = torch.randint(3, 32, (3, 5))
    expected = model(torch.cat([tokens, following], 1)).logits[:, -5:]
    torch.testing.assert_close(model(following, cache=cache).logits, expected, rtol=1e-4, atol=1e-5)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "chunked prefill with beams": {"num_beams": 3, "do_sample": False, "prefill_chunk_size": 3},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_equals_generation_without(make_lm, tokens, mode, padded):
    model = make_lm()
    mask = None
    if padded:
        tokens, mask = left_padded(tokens, [11, 5, 8])
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, "attention_mask": mask}
    torch.manual_seed(5)
    cached = model.generate(tokens, **options, **MODES[mode])
    torch.manual_seed(5)
    plain = {name: value for name, value in MODES[mode].items() if name != "prefill_chunk_size"}
    uncached = model.generate(tokens, use_cache=False, **options, **plain)
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_left_padded_rows_generate_what_they_generate_alone(make_lm, tokens):
    model = make_lm()
    lengths = [11, 5, 8]
    padded, mask = left_padded(tokens, lengths, content=7)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], **options)
        assert torch.equal(together[row, -10:], alone[0, -10:])


def test_chunked_prefill_really_runs_in_chunks(make_lm, tokens):
    model = make_lm()
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    model.generate(tokens, prefill_chunk_size=4, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert widths == [4, 4, 3, 1, 1]


def test_generation_goes_on_from_a_cache(make_lm, tokens):
    model = make_lm()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = model.generate(tokens, **options)
    for chunk in (None, 2):
        cache = model(tokens[:, :7]).cache
        rest = model.generate(tokens[:, 7:], cache=cache, prefill_chunk_size=chunk, **options)
        assert torch.equal(rest[:, -6:], whole[:, -6:])


def test_generation_from_embeddings(make_lm, tokens):
    model = make_lm()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(tokens, **options)[:, 11:])


def test_reordering_moves_the_states_of_all_layers(make_lm, tokens):
    cache = make_lm()(tokens).cache
    before = [layer.recurrent_states[0].clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    for layer, states in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.recurrent_states[0], states[[2, 2, 0]])
        assert not torch.equal(states[2], states[0])


def test_states_survive_offloading(make_lm, tokens):
    model = make_lm()
    expected = model(tokens, cache=model(tokens).cache).logits
    cache = model(tokens).cache
    for layer in cache.layers:
        assert (layer.device, layer.dtype) == (tokens.device, torch.float32)
        layer.offload()
        layer.prefetch()
    assert torch.equal(model(tokens, cache=cache).logits, expected)


def test_a_reset_cache_starts_from_nothing(make_lm, tokens):
    model = make_lm()
    out = model(tokens)
    out.cache.reset()
    assert torch.equal(model(tokens, cache=out.cache).logits, out.logits)


def test_states_are_float32_and_of_the_size_of_their_layer(make_lm, tokens):
    model = make_lm().to(torch.bfloat16)
    layers = model(tokens).cache.layers
    assert [layer.recurrent_states[0].dtype for layer in layers] == [torch.float32] * 3
    assert [layer.recurrent_states[0].shape for layer in layers] == [(3, 5, 2), (3, 8, 2), (3, 3, 2)]


def test_a_cache_of_another_state_size_is_refused(make_lm, tokens):
    model = make_lm()
    cache = model(tokens).cache
    model.model.layers[1].mixer.resize_state(4)
    with pytest.raises(ValueError, match=r"h0 of shape \(3, 4, 2\), found \(3, 8, 2\)"):
        model(tokens, cache=cache)


def test_training_through_a_cache_stops_gradients_at_the_cache(make_lm, tokens):
    model = make_lm().train()
    cache = DynamicCache(config=model.config)
    for piece in tokens.split(4, dim=1):
        model(piece, labels=piece, cache=cache).loss.backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())


def test_no_cache_unless_asked_for(make_config, tokens):
    model = MimoSSMModel(make_config(use_cache=False)).eval()
    assert model(tokens).cache is None
    assert model(tokens, use_cache=True).cache is not None
