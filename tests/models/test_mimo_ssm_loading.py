import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_compressm.models import MimoSSMForCausalLM, MimoSSMForSequenceClassification, MimoSSMModel, layer_state_sizes

RELOAD = """
import sys, torch
import hf_compressm
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = torch.load(f"{folder}/tokens.pt")
with torch.no_grad():
    logits = model(tokens).logits
generated = model.generate(tokens, max_new_tokens=20, do_sample=False)
torch.save((logits, generated), f"{folder}/results.pt")
"""


def mixers(model):
    return [layer.mixer for layer in model.base_model.layers]


def assert_sizes(model, sizes):
    """Parameters and config agree on the sizes."""
    assert [mixer.state_size for mixer in mixers(model)] == sizes
    assert layer_state_sizes(model.config) == sizes
    for mixer in mixers(model):
        assert {getattr(mixer, name).shape[dim] for name, dim in mixer.state_dims.items()} == {mixer.state_size}


def test_bit_equal_in_a_fresh_process(make_lm, tokens, tmp_path, repo_env):
    model = make_lm()
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, env=repo_env)
    logits, generated = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        assert torch.equal(logits, model(tokens).logits)
    assert torch.equal(generated, model.generate(tokens, max_new_tokens=20, do_sample=False))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"input_size": 3}])
def test_save_and_load_every_head(make_lm, tokens, tmp_path, options):
    model = make_lm(**options)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    for auto, expected in (
        (AutoModelForCausalLM, MimoSSMForCausalLM),
        (AutoModel, MimoSSMModel),
        (AutoModelForSequenceClassification, MimoSSMForSequenceClassification),
    ):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is expected
        assert_sizes(loaded, [5, 8, 3])
        for name, value in loaded.base_model.state_dict().items():
            assert torch.equal(value, state[f"model.{name}"]), name


def test_sharded_checkpoint(make_lm, tokens, tmp_path):
    model = make_lm()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_eigenvalues_in_float32(make_lm, tokens, tmp_path, dtype):
    model = make_lm()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, param in half.named_parameters():
        assert param.dtype == (torch.float32 if name.endswith((".nu_log", ".theta")) else dtype), name
    exact = model(tokens).logits
    assert (half(tokens).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    model.to(dtype).save_pretrained(tmp_path)
    assert mixers(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))[0].nu_log.dtype == torch.float32
    built = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    assert mixers(built)[0].nu_log.dtype == torch.float32


def test_marks_survive_loading_and_resizing(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.load_state_dict(make_lm(per_layer_config=None).state_dict(), assign=True)
    mixers(model)[1].resize_state(2)
    marked = {name for name, param in model.named_parameters() if getattr(param, "_no_weight_decay", False)}
    assert marked == {f"model.layers.{i}.mixer.{name}" for i in range(3) for name in ("nu_log", "theta", "D")}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"per_layer_config": None}, r"config gives \(8, 12\), checkpoint has \(5, 12\)"),
        ({"per_layer_config": {"1": {"state_size": 5}}}, r"state sizes \[8, 5, 8\]"),
        ({"num_hidden_layers": 4}, r"layers.3.mixer.B_im: not in the checkpoint"),
        ({"num_hidden_layers": 2, "per_layer_config": {"0": {"state_size": 5}}}, r"layers.2.*in the checkpoint only"),
        ({"hidden_size": 10}, r"config gives \(5, 10\), checkpoint has \(5, 12\)"),
        ({"vocab_size": 30}, r"embed_tokens.weight: config gives \(30, 12\), checkpoint has \(32, 12\)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_an_error(make_lm, tmp_path, change, found):
    make_lm().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | change))
    for options in ({}, {"ignore_mismatched_sizes": True}) if "vocab_size" not in change else ({},):
        with pytest.raises(ValueError, match=found) as caught:
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert "config.json that was saved beside them" in str(caught.value)


def test_a_missing_tensor_of_a_mixer_is_an_error(make_lm, tmp_path):
    make_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mixer.theta"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.theta: not in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_new_head_may_have_another_size(make_classifier, tokens, tmp_path):
    model = make_classifier(num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded(tokens).logits.shape == (3, 5)
    assert torch.equal(loaded.model(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("own", "other"), [([8, 8, 8], [5, 8, 3]), ([5, 8, 3], [8, 8, 8]), ([5, 8, 3], [4, 4, 4])])
def test_state_dicts_of_another_size(make_lm, tokens, own, other, assign):
    def build(sizes):
        return make_lm(per_layer_config={i: {"state_size": n} for i, n in enumerate(sizes)})

    target, source = build(own), build(other)
    kept = dict(target.named_parameters())
    target.load_state_dict(source.state_dict(), assign=assign)
    assert_sizes(target, other)
    assert torch.equal(target(tokens).logits, source(tokens).logits)
    assert target.config.to_dict()["per_layer_config" if len(set(other)) > 1 else "state_size"]
    if not assign:
        assert all(kept[name] is param for name, param in target.named_parameters())


def test_a_state_dict_in_shards_that_split_mixers(make_lm, tokens):
    target, source = make_lm(per_layer_config=None), make_lm()
    state = source.state_dict()
    names = list(state)
    for part in (names[::2], names[1::2]):
        target.load_state_dict({name: state[name] for name in part}, strict=False)
    assert_sizes(target, [5, 8, 3])
    assert torch.equal(target(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize(
    ("name", "shape"), [("B_im", (4, 12)), ("C_re", (12, 4)), ("nu_log", (4,)), ("theta", (5, 1)), ("B_re", (5, 11))]
)
def test_tensors_that_disagree_are_the_ordinary_error(make_lm, name, shape):
    target, state = make_lm(per_layer_config=None), make_lm().state_dict()
    state[f"model.layers.0.mixer.{name}"] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.mixer"):
        target.load_state_dict(state)
    assert mixers(target)[0].state_size == 8


def test_resizing_keeps_the_parameters_and_drops_their_gradients(make_lm, tokens):
    model = make_lm()
    mixer = mixers(model)[1]
    kept = dict(mixer.named_parameters())
    loss = model(tokens, labels=tokens).loss  # a live graph with gradient accumulators of the old shapes
    loss.backward()
    mixer.resize_state(4)
    assert_sizes(model, [5, 4, 3])
    for name, param in mixer.named_parameters():
        assert param is kept[name]
        assert isinstance(param, nn.Parameter)
        if name != "D":
            assert param.grad is None
            assert not param.any()
    with torch.no_grad():
        for param in mixer.parameters():
            param.normal_()
    model(tokens, labels=tokens).loss.backward()
    assert mixer.B_re.grad.shape == (4, 12)


def test_resizing_to_nothing_is_refused(make_lm):
    model = make_lm()
    with pytest.raises(ValueError, match="at least 1 for layer 1, found 0"):
        mixers(model)[1].resize_state(0)
    assert_sizes(model, [5, 8, 3])


def test_a_resized_model_is_saved_and_loaded(make_lm, tokens, tmp_path):
    model = make_lm()
    mixers(model)[1].resize_state(6)
    model.save_pretrained(tmp_path)
    assert layer_state_sizes(AutoConfig.from_pretrained(tmp_path)) == [5, 6, 3]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def trainer_for(model, folder, rows, **options):
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, **options
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_trainer_trains_evaluates_saves_and_resumes_into_another_size(make_lm, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = trainer_for(make_lm(), tmp_path, rows, max_steps=2, label_names=["labels"])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    checkpoint = get_last_checkpoint(tmp_path)
    assert layer_state_sizes(AutoConfig.from_pretrained(checkpoint)) == [5, 8, 3]

    other = make_lm(per_layer_config=None)
    trainer_for(other, tmp_path, rows, max_steps=3).train(resume_from_checkpoint=checkpoint)
    assert_sizes(other, [5, 8, 3])


def test_trainer_accumulates_gradients_of_a_regression_as_one_batch(make_classifier, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": torch.tensor(float(i))} for i, row in enumerate(tokens.repeat(2, 1)[:4])]
    start = make_classifier(num_labels=1).state_dict()
    weights = []
    for steps in (1, 2):
        model = make_classifier(num_labels=1)
        model.load_state_dict(start)
        arguments = TrainingArguments(
            tmp_path / str(steps),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-8, msg=name)
