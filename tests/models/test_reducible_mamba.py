"""Mamba with a state size per layer, and what Mamba-2 has in common with it."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.trainer_utils import get_last_checkpoint

from hf_compressm.models import (
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    ReducibleMambaModel,
    layer_state_sizes,
)
from hf_compressm.models.mamba import modeling_reducible_mamba

SIZES = {"vocab_size": 32, "hidden_size": 12, "state_size": 8, "num_hidden_layers": 3}
STOCK = {
    "mamba": (MambaConfig, MambaForCausalLM, ReducibleMambaConfig, ReducibleMambaForCausalLM, SIZES),
    "mamba2": (
        Mamba2Config,
        Mamba2ForCausalLM,
        ReducibleMamba2Config,
        ReducibleMamba2ForCausalLM,
        SIZES | {"num_heads": 4, "head_dim": 6, "n_groups": 2, "chunk_size": 4},
    ),
}
FAMILIES = ["mamba", "mamba2", "mamba2 with maps"]
every_family = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("family", ["mamba", "mamba2"])


def mixers(model):
    return [layer.mixer for layer in model.base_model.layers]


def close(found, expected, factor=1.0, msg=None):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=factor * 1e-5 * scale + 1e-12, msg=msg)


def randomize(model):
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return model


def left_padded(tokens, lengths, content=0):
    width = tokens.shape[1]
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    return tokens.masked_fill(mask == 0, content), mask


# The stock models


@both
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}])
def test_a_stock_checkpoint_loads_with_the_same_logits_and_gradients(family, options, tokens, tmp_path):
    config_class, stock_class, _, ours_class, sizes = STOCK[family]
    stock = randomize(stock_class(config_class(**sizes, **options))).train()
    stock.save_pretrained(tmp_path)
    ours = ours_class.from_pretrained(tmp_path).train()
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert ours.config.model_type == f"reducible_{family}"
    expected, found = stock(tokens, labels=tokens), ours(tokens, labels=tokens)
    close(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    for (name, param), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        close(other.grad, param.grad, factor=3, msg=name)


@both
def test_a_stock_config_and_a_stock_state_dict(family, tokens):
    config_class, stock_class, ours_config, ours_class, sizes = STOCK[family]
    stock = randomize(stock_class(config_class(**sizes, layer_norm_epsilon=1e-4))).eval()
    config = ours_config.from_stock(stock.config, use_cache=False)
    assert type(config) is ours_config
    assert (config.layer_norm_epsilon, config.use_cache) == (1e-4, False)
    ours = ours_class(config).eval()
    ours.load_state_dict(stock.state_dict())
    close(ours(tokens).logits, stock(tokens).logits)
    with pytest.raises(ValueError, match=f"expected a config of model type '{family}', found 'reducible_{family}'"):
        ours_config.from_stock(config)


@both
def test_left_padding_and_the_cache_as_in_the_stock_model(family, tokens):
    config_class, stock_class, ours_config, ours_class, sizes = STOCK[family]
    stock = randomize(stock_class(config_class(**sizes))).eval()
    ours = ours_class(ours_config.from_stock(stock.config)).eval()
    ours.load_state_dict(stock.state_dict())
    tokens, mask = left_padded(tokens, [11, 5, 8])
    expected, found = stock(tokens, attention_mask=mask), ours(tokens, attention_mask=mask)
    real = mask.bool()
    close(found.logits[real], expected.logits[real])
    for a, b in zip(found.cache.layers, expected.cache.layers, strict=True):
        close(a.conv_states[0], b.conv_states[0])
        close(a.recurrent_states[0], b.recurrent_states[0])
    following = tokens[:, :1]
    expected = stock(following, cache=expected.cache).logits
    close(ours(following, cache=found.cache).logits, expected)


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_on_padded_batches_as_the_stock_model(family, tokens, side):
    config_class, stock_class, ours_config, ours_class, sizes = STOCK[family]
    stock = randomize(stock_class(config_class(**sizes))).train()
    ours = ours_class(ours_config.from_stock(stock.config)).train()
    ours.load_state_dict(stock.state_dict())
    tokens, mask = left_padded(tokens, [11, 5, 8])
    if side == "right":
        tokens, mask = tokens.flip(1), mask.flip(1)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    for model in (stock, ours):
        model(**batch).loss.backward()
    for (name, param), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        close(other.grad, param.grad, factor=3, msg=name)


@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_each_mixer_is_a_stock_mixer_of_its_size(make_reducible, layer_idx):
    model = make_reducible("mamba")
    mixer = mixers(model)[layer_idx]
    stock = MambaMixer(MambaConfig(**(SIZES | {"state_size": [5, 8, 3][layer_idx]})), layer_idx)
    stock.load_state_dict(mixer.state_dict())
    hidden_states = torch.randn(2, 9, 12)
    close(mixer(hidden_states), stock(hidden_states))


@both
def test_initialised_as_the_stock_model(family):
    config_class, stock_class, ours_config, ours_class, sizes = STOCK[family]
    torch.manual_seed(1)
    stock = stock_class(config_class(**sizes | {"hidden_size": 48, "num_heads": 4, "head_dim": 24}))
    ours = ours_class(ours_config.from_stock(stock.config))
    for (name, param), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        if param.numel() > 100:
            torch.testing.assert_close(other.std(), param.std(), rtol=0.3, atol=1e-6, msg=name)
    assert torch.equal(mixers(ours)[0].A_log, mixers(stock)[0].A_log)


# Kernels: a meta device stands for a GPU


@pytest.fixture
def kernels(monkeypatch):
    """Records which kernels of transformers were asked for; they find nothing."""
    asked = []

    def spy(name):
        real = getattr(modeling_reducible_mamba, name)
        monkeypatch.setattr(
            modeling_reducible_mamba, name, lambda *args, **kwargs: (asked.append(name), real(*args, **kwargs))[1]
        )

    for name in ("mamba_inner_fn", "scan_kernel", "causal_conv1d_fn"):
        spy(name)
    return asked


def test_kernels_are_left_to_transformers_outside_the_cpu(make_reducible, tokens, kernels):
    cpu = make_reducible("mamba").train()
    cpu(tokens)
    assert kernels == []
    model, tokens = cpu.to("meta"), tokens.to("meta")
    model(tokens)
    assert kernels == ["mamba_inner_fn", "causal_conv1d_fn", "scan_kernel"] * 3
    kernels.clear()
    cache = model.eval()(tokens).cache
    assert kernels == ["causal_conv1d_fn", "scan_kernel"] * 3
    kernels.clear()
    model(tokens, cache=cache)  # no kernel goes on from a state
    assert kernels == ["causal_conv1d_fn"] * 3


def test_a_fused_kernel_is_the_whole_mixer(make_reducible, tokens, monkeypatch):
    model = make_reducible("mamba").train().to("meta")
    seen = []

    def fused(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, delta_bias, **options):
        seen.append(tuple(A.shape))
        return xz.new_zeros(xz.shape[0], xz.shape[2], out_proj.shape[0])

    monkeypatch.setattr(modeling_reducible_mamba, "mamba_inner_fn", fused)
    monkeypatch.setattr(modeling_reducible_mamba, "scan_kernel", None)
    model(tokens.to("meta"))
    assert seen == [(24, 5), (24, 8), (24, 3)]


# Config


@every_family
def test_a_config_with_unequal_sizes_is_printed_copied_and_saved(make_reducible, family, tmp_path):
    config = make_reducible(family).config
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
        _ = config.state_size
    assert "per_layer_config" in repr(config)
    config.save_pretrained(tmp_path)
    for other in (copy.deepcopy(config), AutoConfig.from_pretrained(tmp_path), type(config)(**config.to_dict())):
        assert type(other) is type(config)
        assert layer_state_sizes(other) == [5, 8, 3]
        other.name_or_path = config.name_or_path
        assert other.to_dict() == config.to_dict()


@both
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"state_size": 0}, "state_size of layer 0 to be an integer of at least 1, found 0"),
        ({"per_layer_config": {2: {"state_size": -1}}}, "state_size of layer 2"),
        ({"per_layer_config": {1: {"hidden_size": 4}}}, r"set nothing but `state_size`.*, found \['hidden_size'\]"),
        ({"per_layer_config": {1: {"skip": ["mixer"]}}}, r"set nothing but `state_size`.*, found \['skip'\]"),
    ],
)
def test_a_wrong_config_is_refused(family, options, found):
    *_, ours_config, _, sizes = STOCK[family]
    with pytest.raises(StrictDataclassError, match=found):
        ours_config(**(sizes | options))


# Generation


@every_family
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [10, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_continue_the_cache(make_reducible, tokens, family, pieces, padded):
    model = make_reducible(family, use_bias=True)
    tokens, mask = left_padded(tokens, [11, 6, 9]) if padded else (tokens, torch.ones_like(tokens))
    whole = model(tokens, attention_mask=mask)
    logits, cache, seen = [], None, 0
    for count in pieces:
        seen += count
        out = model(tokens[:, seen - count : seen], attention_mask=mask[:, :seen], cache=cache)
        logits.append(out.logits)
        cache = out.cache
    close(torch.cat(logits, 1)[mask.bool()], whole.logits[mask.bool()], factor=5)
    for layer, expected in zip(cache.layers, whole.cache.layers, strict=True):
        close(layer.recurrent_states[0], expected.recurrent_states[0], factor=5)
        close(layer.conv_states[0], expected.conv_states[0], factor=5)


@every_family
@pytest.mark.parametrize("before", [0, 5])
def test_padding_anywhere_changes_no_real_token_and_no_continuation(make_reducible, tokens, family, before):
    model = make_reducible(family, use_bias=True)
    spread = torch.full((3, 18), 7)
    mask = torch.zeros(3, 18, dtype=torch.long)
    for row in range(3):
        mask[row, torch.randperm(18)[:11].sort().values] = 1
        spread[row, mask[row].bool()] = tokens[row]
    history = torch.randint(3, 32, (3, before))
    cache = model(history).cache if before else None
    out = model(spread, attention_mask=mask, cache=cache, use_cache=True)
    expected = model(torch.cat([history, tokens], 1))
    close(out.logits[mask.bool()], expected.logits[:, before:].reshape(-1, 32), factor=5)
    following = torch.randint(3, 32, (3, 2))
    expected = model(following, cache=expected.cache).logits
    close(model(following, cache=out.cache).logits, expected, factor=5)


@both
def test_padding_without_a_number_stays_where_it_is(make_reducible, tokens, family):
    model = make_reducible(family)
    embeds = model.get_input_embeddings()(tokens).detach()
    mask = torch.ones_like(tokens)
    mask[:, :3] = 0
    expected = model(inputs_embeds=embeds, attention_mask=mask).logits[:, 3:]
    embeds[:, :3] = torch.nan
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits[:, 3:], expected)


@both
@pytest.mark.parametrize("shape", [(3, 10), (3, 12), (2, 11), (3, 1, 11)])
def test_a_mask_of_another_shape_is_refused(make_reducible, tokens, family, shape):
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(3, 11\), found"):
        make_reducible(family)(tokens, attention_mask=torch.ones(shape))


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
    "chunked prefill with beams": {"num_beams": 3, "do_sample": False, "prefill_chunk_size": 1},
}


@every_family
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_generation_with_a_cache_equals_generation_without(make_reducible, tokens, family, mode, padded):
    model = make_reducible(family)
    tokens, mask = left_padded(tokens, [11, 5, 8]) if padded else (tokens, None)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, "attention_mask": mask}
    torch.manual_seed(5)
    cached = model.generate(tokens, **options, **MODES[mode])
    torch.manual_seed(5)
    plain = {name: value for name, value in MODES[mode].items() if name != "prefill_chunk_size"}
    uncached = model.generate(tokens, use_cache=False, **options, **plain)
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        close(a, b, factor=10)


@every_family
def test_left_padded_rows_generate_what_they_generate_alone(make_reducible, tokens, family):
    model = make_reducible(family, use_bias=True)
    lengths = [11, 5, 8]
    padded, mask = left_padded(tokens, lengths, content=7)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(padded, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], **options)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@both
def test_generation_goes_on_from_a_cache(make_reducible, tokens, family):
    model = make_reducible(family)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = model.generate(tokens, **options)
    for chunk in (None, 2):
        cache = model(tokens[:, :7]).cache
        rest = model.generate(tokens[:, 7:], cache=cache, prefill_chunk_size=chunk, **options)
        assert torch.equal(rest[:, -6:], whole[:, -6:])


@every_family
def test_states_are_float32_and_of_the_size_of_their_layer(make_reducible, tokens, family):
    layers = make_reducible(family).to(torch.bfloat16)(tokens).cache.layers
    assert [layer.recurrent_states[0].dtype for layer in layers] == [torch.float32] * 3
    assert [layer.recurrent_states[0].shape[-1] for layer in layers] == [5, 8, 3]


@both
def test_a_cache_of_another_state_size_is_refused(make_reducible, tokens, family):
    model = make_reducible(family)
    cache = model(tokens).cache
    mixers(model)[1].resize_state(4)
    found = {
        "mamba": "expected h0 of shape",
        "mamba2": r"expected cache .* \(3, 40\) in layer 1, found \(3, 56\)",
    }
    with pytest.raises(ValueError, match=found[family]):
        model(tokens, cache=cache)


# Training


@every_family
def test_training_through_a_cache_stops_gradients_at_the_cache(make_reducible, tokens, family):
    model = make_reducible(family).train()
    cache = DynamicCache(config=model.config)
    for piece in tokens.split(4, dim=1):
        model(piece, labels=piece, cache=cache).loss.backward()
    assert all(param.grad.isfinite().all() for param in model.parameters())


@every_family
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(make_reducible, tokens, family, use_reentrant):
    model = make_reducible(family).train()
    tokens, mask = left_padded(tokens, [11, 5, 8])
    labels = tokens.masked_fill(mask == 0, -100)
    model(tokens, attention_mask=mask, labels=labels).loss.backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model(tokens, attention_mask=mask, labels=labels).loss.backward()
    for name, param in model.named_parameters():
        close(param.grad, expected[name], msg=name)
    with pytest.raises(ValueError, match=r"pass no cache, or call gradient_checkpointing_disable\(\)"):
        model(tokens, cache=DynamicCache(config=model.config))


@every_family
def test_autocast_stays_near_float32(make_reducible, tokens, family):
    model = make_reducible(family).train()
    model(tokens, labels=tokens).loss.backward()
    exact = torch.cat([param.grad.flatten() for param in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    found = torch.cat([param.grad.flatten() for param in model.parameters()])
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.1 * exact.norm()


def test_a_mixer_in_float64_is_differentiated_exactly(make_reducible):
    mixer = mixers(make_reducible("mamba"))[0].double()
    names, params = zip(*mixer.named_parameters(), strict=True)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])

    def run(hidden_states, *values):
        return torch.func.functional_call(
            mixer, dict(zip(names, values, strict=True)), hidden_states, {"attention_mask": mask}
        )

    hidden_states = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (hidden_states, *params), fast_mode=True)


# Saving and loading


@every_family
def test_save_and_load_are_exact(make_reducible, family, tokens, tmp_path):
    model = make_reducible(family)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert [mixer.state_size for mixer in mixers(loaded)] == layer_state_sizes(loaded.config) == [5, 8, 3]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is type(model.base_model)
    assert torch.equal(base(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state)


@every_family
def test_a_config_that_does_not_fit_the_weights_is_an_error(make_reducible, family, tmp_path):
    make_reducible(family).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for change, found in (
        ({"per_layer_config": None}, r"layers\.0\.mixer\.\w+\S*: config gives .*, checkpoint has"),
        ({"num_hidden_layers": 4}, r"layers\.3\.mixer\.\S+: not in the checkpoint"),
        ({"hidden_size": 6, "expand": 4}, r"layers\.0\.\S+: config gives .*, checkpoint has"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written | change))
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match=found) as caught:
                AutoModelForCausalLM.from_pretrained(tmp_path, **options)
            assert "config.json that was saved beside them" in str(caught.value)


def test_a_missing_tensor_of_a_mixer_is_an_error(make_reducible, tmp_path):
    make_reducible("mamba").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["backbone.layers.1.mixer.A_log"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.A_log: not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@both
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("own", "other"), [([8, 8, 8], [5, 8, 3]), ([5, 8, 3], [8, 8, 8]), ([5, 8, 3], [4, 4, 4])])
def test_state_dicts_of_another_size(make_reducible, tokens, family, own, other, assign):
    def build(sizes):
        return make_reducible(family, per_layer_config={i: {"state_size": n} for i, n in enumerate(sizes)})

    target, source = build(own), build(other)
    kept = dict(target.named_parameters())
    target.load_state_dict(source.state_dict(), assign=assign)
    assert [mixer.state_size for mixer in mixers(target)] == layer_state_sizes(target.config) == other
    assert torch.equal(target(tokens).logits, source(tokens).logits)
    marked = [name for name, param in target.named_parameters() if getattr(param, "_no_weight_decay", False)]
    assert len(marked) == 3 * len(mixers(target)[0].no_weight_decay)
    if not assign:
        assert all(kept[name] is param for name, param in target.named_parameters())


@every_family
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_state_dict_in_shards_that_split_mixers(make_reducible, tokens, family, parts):
    target, source = make_reducible(family, per_layer_config=None), make_reducible(family)
    state = source.state_dict()
    for part in range(parts):
        target.load_state_dict(dict(list(state.items())[part::parts]), strict=False)
    assert layer_state_sizes(target.config) == [5, 8, 3]
    assert torch.equal(target(tokens).logits, source(tokens).logits)
    assert target.config.to_dict() == source.config.to_dict()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("A_log", (24, 4)),
        ("A_log", (23, 5)),
        ("A_log", (24,)),
        ("x_proj.weight", (9, 24)),
        ("x_proj.weight", (12, 24)),
    ],
)
def test_tensors_that_disagree_are_the_ordinary_error(make_reducible, name, shape):
    target, state = make_reducible("mamba", per_layer_config=None), make_reducible("mamba").state_dict()
    state[f"backbone.layers.0.mixer.{name}"] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\.layers\.0\.mixer"):
        target.load_state_dict(state)
    assert mixers(target)[0].state_size == 8


# Resizing


def test_resizing_keeps_the_parameters_and_what_is_not_of_the_state(make_reducible, tokens, tmp_path):
    model = make_reducible("mamba").train()
    mixer = mixers(model)[1]
    kept, rows = dict(mixer.named_parameters()), mixer.x_proj.weight.detach()[:1].clone()
    loss = model(tokens, labels=tokens).loss  # a live graph with gradient accumulators of the old shapes
    loss.backward()
    mixer.resize_state(4)
    assert layer_state_sizes(model.config) == [5, 4, 3]
    assert mixer.state_size == 4
    assert all(kept[name] is param for name, param in mixer.named_parameters())
    assert isinstance(mixer.A_log, nn.Parameter)
    assert mixer.A_log._no_weight_decay
    assert mixer.A_log.grad is mixer.x_proj.weight.grad is None
    assert torch.equal(mixer.x_proj.weight[:1], rows)
    assert mixer.A_log.shape == (24, 4)
    assert mixer.x_proj.weight.shape == (9, 24)
    assert not mixer.x_proj.weight[1:].any()
    assert not mixer.A_log.any()
    with torch.no_grad():
        mixer.x_proj.weight.normal_()
    model(tokens, labels=tokens).loss.backward()
    assert mixer.A_log.grad.shape == (24, 4)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@both
def test_resizing_to_nothing_is_refused(make_reducible, family):
    model = make_reducible(family)
    with pytest.raises(ValueError, match="at least 1 for layer 1, found 0"):
        mixers(model)[1].resize_state(0)
    assert layer_state_sizes(model.config) == [5, 8, 3]


@every_family
def test_marks_survive_loading_copying_and_resizing(make_reducible, family, tmp_path):
    make_reducible(family).save_pretrained(tmp_path)
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path))
    mixers(model)[0].resize_state(2)
    marked = {name for name, param in model.named_parameters() if getattr(param, "_no_weight_decay", False)}
    names = {"A_log", "D"} if family == "mamba" else {"A_log", "D", "dt_bias"}
    assert marked == {f"backbone.layers.{i}.mixer.{name}" for i in range(3) for name in names}


@every_family
def test_trainer_resumes_into_another_size(make_reducible, tokens, family, tmp_path):
    def trainer(model, steps):
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "max_steps": steps}
        arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, **options)
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)

    first = trainer(make_reducible(family), 2)
    first.train()
    assert first.predict(first.eval_dataset).predictions.shape == (3, 11, 32)  # logits alone, no cache
    other = make_reducible(family, per_layer_config=None)
    trainer(other, 3).train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
    assert layer_state_sizes(other.config) == [5, 8, 3]
    assert [mixer.state_size for mixer in mixers(other)] == [5, 8, 3]


def test_the_base_model_alone(tokens):
    model = ReducibleMambaModel(ReducibleMambaConfig(**SIZES, use_cache=False)).eval()
    assert model(tokens).cache is None
    assert model(tokens, use_cache=True).cache is not None
