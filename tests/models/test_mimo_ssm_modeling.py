import copy
import io
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from hf_compressm.models import LRU, MimoSSMForCausalLM, MimoSSMForSequenceClassification, MimoSSMModel


def pad(tokens, side, count, content):
    """`tokens` with `count` columns of padding more, the mask and the columns where the tokens now are."""
    batch, length = tokens.shape[:2]
    filler = torch.full((batch, count, *tokens.shape[2:]), content, dtype=tokens.dtype)
    ones, zeros = torch.ones(batch, length, dtype=torch.long), torch.zeros(batch, count, dtype=torch.long)
    if side == "left":
        return torch.cat([filler, tokens], 1), torch.cat([zeros, ones], 1), slice(count, None)
    return torch.cat([tokens, filler], 1), torch.cat([ones, zeros], 1), slice(None, length)


def grads(model):
    return {name: param.grad for name, param in model.named_parameters()}


def test_mixer_is_the_recurrence_of_the_paper(make_config):
    lru = MimoSSMModel(make_config()).layers[0].mixer.double()
    u = torch.randn(2, 9, 12, dtype=torch.float64)
    lam = torch.exp(torch.complex(-torch.exp(lru.nu_log), lru.theta))
    B = torch.sqrt(1 - lam.abs() ** 2)[:, None] * torch.complex(lru.B_re, lru.B_im)
    C = torch.complex(lru.C_re, lru.C_im)
    expected = torch.zeros_like(u)
    for t in range(9):
        for s in range(t + 1):
            kernel = (C * lam ** (t - s)) @ B
            expected[:, t] += u[:, s] @ kernel.real.T
    torch.testing.assert_close(lru(u), expected + lru.D * u, rtol=1e-9, atol=1e-9)


def test_initial_eigenvalues_lie_on_the_ring_with_uniform_area(make_config):
    model = MimoSSMModel(make_config(state_size=20000, r_min=0.6, r_max=0.9, max_phase=1.0, num_hidden_layers=1))
    lru = model.layers[0].mixer.requires_grad_(False)
    radius = torch.exp(-torch.exp(lru.nu_log))
    assert 0.6 <= radius.min() < 0.601
    assert 0.899 < radius.max() <= 0.9
    share = (radius**2).sub(0.36).div(0.45).clamp(0, 1)
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert share.var() == pytest.approx(1 / 12, abs=0.005)
    assert 0 <= lru.theta.min() < 0.001
    assert 0.999 < lru.theta.max() <= 1.0
    assert (lru.B_re**2 + lru.B_im**2).sum(1).mean() == pytest.approx(1, abs=0.02)
    assert (lru.C_re**2).sum(1).mean() == pytest.approx(1, abs=0.02)
    assert (lru.C_im**2).sum(1).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_initial_eigenvalues_at_the_ends_of_the_full_ring_are_finite(make_config, monkeypatch, draw):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, draw, **options))
    lru = MimoSSMModel(make_config(r_min=0.0, r_max=1.0)).layers[0].mixer
    lru(torch.randn(1, 4, 12)).sum().backward()
    assert lru.nu_log.isfinite().all()
    assert all(param.grad.isfinite().all() for param in lru.parameters())


@pytest.mark.parametrize("content", [0, 31])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_loss_nor_gradients(make_lm, tokens, side, content):
    model = make_lm()
    plain = model(tokens, labels=tokens)
    plain.loss.backward()
    expected = {name: grad.clone() for name, grad in grads(model).items()}
    model.zero_grad()
    padded, mask, real = pad(tokens, side, 5, content)
    out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(out.logits[:, real], plain.logits, rtol=1e-5, atol=1e-5)
    if side == "right":
        torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-5)
        out.loss.backward()
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_left_padding_with_labels_adds_the_prediction_of_the_first_token_only(make_lm, tokens):
    model = make_lm()
    padded, mask, _ = pad(tokens, "left", 5, 0)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 5] = -100
    torch.testing.assert_close(
        model(padded, attention_mask=mask, labels=labels).loss, model(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_of_different_lengths_in_the_middle(make_lm, tokens, dtype):
    model = make_lm()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 11, [0] * 11]).to(dtype)
    out = model(tokens, attention_mask=mask)
    for row in (0, 1):
        real = mask[row].bool()
        alone = model(tokens[row][real][None]).logits[0]
        torch.testing.assert_close(out.logits[row][real], alone, rtol=1e-5, atol=1e-5)
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("content", [0.0, 1e20, math.nan, math.inf])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_of_input_values_changes_nothing(make_classifier, pooling, side, content):
    model = make_classifier(vocab_size=None, input_size=2, pooling=pooling, num_labels=4)
    values, labels = torch.randn(3, 9, 2), torch.tensor([0, 3, 1])
    plain = model(input_values=values, labels=labels)
    plain.loss.backward()
    expected = {name: grad.clone() for name, grad in grads(model).items()}
    model.zero_grad()
    padded, mask, _ = pad(values, side, 6, content)
    out = model(input_values=padded, attention_mask=mask, labels=labels)
    out.loss.backward()
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-5)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_padding_of_embeddings_may_be_anything(make_lm, tokens):
    model = make_lm()
    embeds = model.get_input_embeddings()(tokens).detach()
    padded, mask, real = pad(embeds, "left", 4, math.nan)
    out = model(inputs_embeds=padded, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, real], model(tokens).logits, rtol=1e-5, atol=1e-5)
    out.logits[:, real].sum().backward()
    trained = [param for name, param in model.named_parameters() if "embed" not in name]
    assert all(param.grad.isfinite().all() for param in trained)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling_over_real_tokens_of_different_lengths(make_classifier, tokens, pooling):
    model = make_classifier(pooling=pooling)
    lengths = [4, 11, 7]
    mask = (torch.arange(11)[None] < torch.tensor(lengths)[:, None]).long()
    out = model(tokens, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row], model(tokens[row : row + 1, :length]).logits[0], rtol=1e-5, atol=1e-5)


def test_pooling_mean_and_last_are_what_they_say(make_classifier, tokens):
    for pooling, reduce in (("mean", lambda x: x.mean(1)), ("last", lambda x: x[:, -1])):
        model = make_classifier(pooling=pooling)
        expected = model.score(reduce(model.model(tokens).last_hidden_state))
        torch.testing.assert_close(model(tokens).logits, expected)


def test_a_row_without_real_tokens_is_finite(make_classifier, tokens):
    mask = torch.ones_like(tokens)
    mask[1] = 0
    for pooling in ("mean", "last"):
        model = make_classifier(pooling=pooling)
        out = model(tokens, attention_mask=mask, labels=torch.tensor([0, 1, 1]))
        out.loss.backward()
        assert out.logits.isfinite().all()
        assert all(param.grad.isfinite().all() for param in model.parameters())


def test_problem_types(make_classifier, tokens):
    cases = [
        ({"num_labels": 3}, torch.tensor([0, 2, 1]), F.cross_entropy, "single_label_classification"),
        ({"num_labels": 1}, torch.randn(3), lambda x, y: F.mse_loss(x.squeeze(), y), "regression"),
        ({"num_labels": 3, "problem_type": "regression"}, torch.randn(3, 3), F.mse_loss, "regression"),
        (
            {"num_labels": 3},
            torch.rand(3, 3).round(),
            F.binary_cross_entropy_with_logits,
            "multi_label_classification",
        ),
    ]
    for options, labels, loss, problem_type in cases:
        model = make_classifier(**options)
        out = model(tokens, labels=labels)
        torch.testing.assert_close(out.loss, loss(out.logits, labels))
        assert model.config.problem_type == problem_type
        parts = sum(
            model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=labels.numel()).loss
            for i in range(3)
        )
        torch.testing.assert_close(parts, out.loss)


def test_language_model_loss_over_micro_batches(make_lm, tokens):
    model = make_lm()
    labels = tokens.clone()
    labels[0, 2:] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(tokens, labels=labels).loss
    parts = sum(model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3))
    torch.testing.assert_close(parts, whole)


def test_three_kinds_of_input_agree(make_lm, tokens):
    model = make_lm(input_size=4)
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(tokens).logits)
    values = torch.randn(3, 5, 4)
    projected = model.model.input_proj(values)
    torch.testing.assert_close(model(input_values=values).logits, model(inputs_embeds=projected).logits)


def test_values_of_one_channel_need_no_channel_dimension(make_classifier):
    model = make_classifier(vocab_size=None, input_size=1)
    values = torch.randn(2, 7)
    assert torch.equal(model(input_values=values).logits, model(input_values=values[..., None]).logits)


@pytest.mark.parametrize(
    ("sizes", "inputs", "message"),
    [
        ({}, {}, "exactly one of input_ids, inputs_embeds, input_values; found none"),
        ({"input_size": 2}, {"input_ids": "ids", "input_values": "values"}, "found input_ids and input_values"),
        ({"vocab_size": None, "input_size": 2}, {"input_ids": "ids"}, "config has no vocab_size"),
        ({}, {"input_values": "values"}, "config has no input_size"),
        ({"input_size": 3}, {"input_values": "values"}, r"\(batch, L, 3\), found \(2, 5, 2\)"),
        ({"input_size": 1}, {"input_values": "values"}, r"\(batch, L, 1\) or \(batch, L\), found"),
        ({}, {"input_ids": "ids", "attention_mask": "short"}, r"attention_mask of shape \(2, 5\), found \(2, 4\)"),
        ({}, {"input_ids": "ids", "attention_mask": "long"}, r"attention_mask of shape \(2, 5\), found \(2, 6\)"),
        ({}, {"input_ids": "ids", "attention_mask": "4d"}, r"attention_mask of shape \(2, 5\), found \(2, 1, 5, 5\)"),
    ],
)
def test_inputs_that_do_not_fit(make_config, sizes, inputs, message):
    tensors = {
        "ids": torch.ones(2, 5, dtype=torch.long),
        "values": torch.ones(2, 5, 2),
        "short": torch.ones(2, 4),
        "long": torch.ones(2, 6),
        "4d": torch.ones(2, 1, 5, 5),
    }
    model = MimoSSMModel(make_config(**sizes))
    with pytest.raises(ValueError, match=message):
        model(**{name: tensors[key] for name, key in inputs.items()})


def test_a_language_model_needs_a_vocabulary(make_config):
    with pytest.raises(ValueError, match="needs `vocab_size`"):
        MimoSSMForCausalLM(make_config(vocab_size=None, input_size=1))


def test_outputs_follow_transformers(make_lm, tokens):
    model = make_lm()
    out = model(tokens, labels=tokens, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(3, 11, 12)] * 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    loss, logits, cache, hidden_states = model(tokens, labels=tokens, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(loss, out.loss)
    assert len(cache.layers) == 3
    assert len(hidden_states) == 4
    assert model(tokens).hidden_states is None
    assert model.train()(tokens).cache is None


def test_logits_to_keep(make_lm, tokens):
    model = make_lm()
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])


def test_gradient_checkpointing_changes_no_gradient(make_lm, tokens):
    model = make_lm(hidden_dropout=0.2).train()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    results = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        results.append({name: grad.clone() for name, grad in grads(model).items()})
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name
    assert model(tokens, use_cache=True).cache is None
    with pytest.raises(ValueError, match="gradient checkpointing would run each recurrence twice"):
        model(tokens, cache=DynamicCache(config=model.config))


def test_dropout_acts_in_training_only(make_lm, tokens):
    model = make_lm(hidden_dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_autocast_and_bfloat16_stay_close(make_lm, tokens):
    model = make_lm()
    exact = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.train()(tokens, labels=tokens)
    out.loss.backward()
    assert (out.logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(param.grad.dtype == param.dtype for param in model.parameters())


def test_compiled_equals_eager(make_lm, tokens):
    model = make_lm().train()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    eager = model(tokens, attention_mask=mask, labels=tokens)
    eager.loss.backward()
    expected = {name: grad.clone() for name, grad in grads(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    out = compiled(tokens, attention_mask=mask, labels=tokens)
    out.loss.backward()
    torch.testing.assert_close(out.logits, eager.logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_are_whole_and_independent(make_lm, tokens, duplicate):
    model = make_lm()
    twin = duplicate(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    mixer = twin.model.layers[1].mixer
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)} == {
        "nu_log",
        "theta",
        "D",
    }
    assert mixer.config is twin.config
    mixer.resize_state(2)
    assert model.config.per_layer_config[1].state_size == 8
    assert twin.config.per_layer_config[1].state_size == 2


def test_tied_embeddings(make_lm, tokens):
    model = make_lm(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert make_lm().lm_head.weight is not model.model.embed_tokens.weight


def test_more_tokens(make_lm, tokens):
    model = make_lm()
    before = model(tokens).logits
    model.resize_token_embeddings(40)
    assert model.config.vocab_size == 40
    torch.testing.assert_close(model(tokens).logits[..., :32], before)


def test_input_embeddings_of_every_kind(make_config, make_lm, make_classifier):
    lm = make_lm()
    assert lm.get_input_embeddings() is lm.model.get_input_embeddings() is lm.model.embed_tokens
    classifier = make_classifier(vocab_size=None, input_size=1)
    assert classifier.get_input_embeddings() is classifier.model.input_proj
    assert classifier.main_input_name == "input_values"
    assert MimoSSMForSequenceClassification(make_config()).main_input_name == "input_ids"


def test_mixer_prints_its_sizes(make_lm):
    mixers = [module for module in make_lm().modules() if isinstance(module, LRU)]
    assert [str(mixer) for mixer in mixers] == [f"LRU(hidden_size=12, state_size={n})" for n in (5, 8, 3)]
