"""The whole-model pass."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import batch, state_sizes, tiny_lm, train
from torch import nn

from hf_compressm import (
    CompressionConfig,
    MimoSSMForCausalLM,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    UnsupportedSetupError,
    accept_other_sizes,
    compress,
    hankel_singular_values,
    ssm_param_groups,
)


@pytest.fixture(scope="module")
def trained():
    """A model with few inputs per state, so that many states are redundant, after some real training."""
    model = tiny_lm(state_size=96, hidden_size=8, max_phase=0.6, r_min=0.5, r_max=0.98)
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), steps=40)
    return model.eval()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@torch.no_grad()
def logits_of(model):
    return model.eval()(batch()["input_ids"]).logits


def frozen(model, optimizer=None):
    """Everything that must not change, by value."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = [] if optimizer is None else copy.deepcopy(optimizer.state_dict()["state"])
    return weights, state, model.config.to_dict()


def assert_unchanged(before, model, optimizer=None):
    weights, state, config = before
    now = frozen(model, optimizer)
    assert all(torch.equal(weights[k], now[0][k]) for k in weights | now[0])
    for index, entries in enumerate(state):
        assert str(entries) == str(list(now[1])[index])
    assert config == now[2]


@pytest.mark.parametrize(
    "options",
    [
        {"target_state_size": 96},
        {"tolerance": 0.1, "min_reduction": 0.99},
        {"tolerance": 0.3, "dry_run": True},
        {"tolerance": 0.3, "min_state_size": 96},
    ],
)
def test_a_rule_that_keeps_every_state_changes_nothing_bit_for_bit(model, options):
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=2)
    before = frozen(model, optimizer)
    report = compress(model, optimizer=optimizer, **options)
    assert_unchanged(before, model, optimizer)
    assert len(report.events[0].layers) == 2
    assert (report.events[0].layers[0].after < 96) == bool(options.get("dry_run"))


def test_a_tiny_tolerance_changes_the_logits_of_a_trained_model_by_less_than_1e_4(model):
    before = logits_of(model)
    compress(model, tolerance=1e-6, min_reduction=0.0)
    assert max(state_sizes(model)) < 90
    assert (logits_of(model) - before).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["balanced", "complex"])
def test_the_errors_of_the_layers_in_the_model_are_those_of_the_report(model, method):
    """Through the float32 weights and the model's own scan: the H∞ norm bounds the gain on any input, and the H₂ norm
    is the output's size when the input is white noise."""
    mixers = [layer.mixer for layer in model.model.layers]
    u = torch.randn(4, 20_000, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [mixer(u) for mixer in mixers]
        report = compress(model, target_state_size=12, method=method)
        for mixer, old, layer in zip(mixers, before, report.events[0].layers, strict=True):
            assert mixer.state_size == layer.after <= 12
            error = (mixer(u) - old).norm()
            assert 0 < error / u.norm() <= layer.error_bound
            assert error / (old - mixer.D * u).norm() == pytest.approx(layer.relative_error, rel=0.05)


def test_automatic_reduction_is_no_worse_than_the_complex_one(trained):
    for target in (48, 24, 12, 6):
        errors = {}
        for method in ("auto", "complex"):
            report = compress(copy.deepcopy(trained), target_state_size=target, method=method)
            errors[method] = [layer.relative_error for layer in report.events[0].layers]
        assert all(a <= c * (1 + 1e-9) for a, c in zip(errors["auto"], errors["complex"], strict=True))


def test_the_reported_energy_is_what_the_tolerance_allows(model):
    report = compress(model, tolerance=0.1)
    for layer in report.events[0].layers:
        assert layer.after < layer.before
        assert 0 < layer.energy_discarded <= 0.1
        assert len(layer.hankel_singular_values) == 2 * layer.before


def test_spectra_are_descending_and_of_the_documented_length(model):
    real = hankel_singular_values(model)
    complex_ = hankel_singular_values(model, method="complex")
    assert list(real) == ["model.layers.0.mixer", "model.layers.1.mixer"]
    for spectrum, length in [(v, 192) for v in real.values()] + [(v, 96) for v in complex_.values()]:
        assert spectrum.dtype == torch.float64
        assert spectrum.shape == (length,)
        assert (spectrum[:-1] >= spectrum[1:]).all()


def test_sizes_follow_the_options(trained):
    reduced = copy.deepcopy(trained)
    compress(reduced, tolerance=0.1, multiple_of=8, min_state_size=20)
    assert all(size % 8 == 0 and size >= 24 for size in state_sizes(reduced))

    reduced = copy.deepcopy(trained)
    compress(reduced, tolerance=0.1, uniform=True)
    sizes = state_sizes(reduced)
    assert sizes[0] == sizes[1] < 96
    assert not reduced.config.to_dict().get("per_layer_config")

    reduced = copy.deepcopy(trained)
    compress(reduced, reduction_fraction=0.5, budget="global")
    assert sum(state_sizes(reduced)) <= 96


def test_a_layer_with_nan_is_left_alone_with_a_warning_and_the_others_are_reduced(model, caplog):
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.B_re[3, 2] = torch.nan
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    report = compress(model, tolerance=0.1)
    assert mixer.state_size == 96
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in mixer.state_dict().items())
    assert state_sizes(model)[1] < 96
    assert "NaN" in report.events[0].layers[0].note
    assert "model.layers.0.mixer keeps its 96 states" in caplog.text


def test_an_unstable_layer_is_left_alone(model, caplog):
    with torch.no_grad():
        model.model.layers[1].mixer.nu_log[0] = -200.0  # |λ| = 1 in any precision
    compress(model, tolerance=0.1)
    assert state_sizes(model)[1] == 96
    assert state_sizes(model)[0] < 96
    assert "stable" in caplog.text


RELOAD = """
import sys, torch, hf_compressm
from transformers import AutoModelForCausalLM
path, inputs, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path).eval()
ids = torch.load(inputs)
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids[:, :16], max_new_tokens=12, do_sample=False)
again = hf_compressm.compress(model, target_state_size=4)
torch.save({"logits": logits, "tokens": tokens, "config": model.config.to_dict(), "name": type(model).__name__,
            "after": [layer.after for layer in again.events[0].layers], "final": model(ids).logits}, out)
"""


def test_a_reduced_model_reloads_bit_equal_in_a_new_process_and_can_be_reduced_again(model, tmp_path):
    compress(model, tolerance=0.15)
    sizes = state_sizes(model)
    assert max(sizes) <= 48
    assert sizes[0] != sizes[1]
    model.save_pretrained(tmp_path / "model")
    ids = batch()["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("model", "ids.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True)
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found["logits"], logits_of(model))
    assert torch.equal(found["tokens"], model.generate(ids[:, :16], max_new_tokens=12, do_sample=False))
    assert max(found["after"]) <= 4
    assert found["final"].isfinite().all()
    reloaded = MimoSSMForCausalLM.from_pretrained(tmp_path / "model")
    assert state_sizes(reloaded) == sizes


@pytest.mark.parametrize("moments", ["carry", "reset"])
def test_a_plain_loop_goes_on_training_where_it_was(moments):
    model = tiny_lm(state_size=64, hidden_size=16)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(ssm_param_groups(model, lr=3e-3, ssm_lr=1e-3, weight_decay=0.01))
    model, optimizer = accelerator.prepare(model, optimizer)
    params = {id(p) for p in model.parameters()}
    first = train(model, optimizer, steps=30)
    compress(model, tolerance=0.03, optimizer=optimizer, moments=moments)
    second = train(model, optimizer, steps=30)
    assert {id(p) for p in model.parameters()} == params
    assert max(state_sizes(model)) < 64
    assert second[0] < first[0] - 0.5 * (first[0] - first[-1])  # what was learned is kept
    assert second[-1] < first[-1]


def test_moments_follow_the_change_of_basis():
    """The first moments of the reduced model are the gradients in the reduced basis: after a lossless reduction (the
    removed states are not driven) they equal those of the same gradient, taken after the reduction."""
    model = tiny_lm(state_size=24, hidden_size=8, layers=1)
    mixer = model.model.layers[0].mixer
    with torch.no_grad():
        mixer.B_re[12:] = 0
        mixer.B_im[12:] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    train(model, optimizer, steps=1)
    compress(model, target_state_size=12, optimizer=optimizer)
    model(**batch()).loss.backward()
    assert mixer.state_size <= 12
    for name in ("B_re", "B_im", "C_re", "C_im"):
        param = getattr(mixer, name)
        error = (optimizer.state[param]["momentum_buffer"] - param.grad).norm() / param.grad.norm()
        assert error < 1e-3, name
    assert mixer.theta not in optimizer.state


def test_a_compiled_model_is_reduced_through_its_wrapper(model):
    compiled = torch.compile(model, backend="aot_eager")
    before = logits_of(compiled)
    compress(compiled, tolerance=1e-3)
    assert max(state_sizes(model)) < 96
    after = logits_of(compiled)
    torch.testing.assert_close(after, logits_of(model), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() < 0.1


def test_a_model_with_nothing_to_reduce_is_refused():
    for call in (compress, hankel_singular_values, lambda m: ssm_param_groups(m, lr=1.0)):
        with pytest.raises(ValueError, match=r"no (layer whose state can be reduced; known layers are|reducible)"):
            call(nn.Linear(3, 3))


def test_a_target_above_the_present_size_is_refused(model):
    before = frozen(model)
    with pytest.raises(ValueError, match="target_state_size=97 is above the present state size 96"):
        compress(model, target_state_size=97)
    assert_unchanged(before, model)


def test_a_config_and_its_fields_are_not_mixed(model):
    with pytest.raises(ValueError, match=r"found both \(the config and \['tolerance'\]\)"):
        compress(model, CompressionConfig(), tolerance=0.1)


def test_an_optimizer_that_cannot_follow_is_refused_before_anything_changes(model):
    before = frozen(model)
    with pytest.raises(ValueError, match="NAdam cannot be carried"):
        compress(model, optimizer=torch.optim.NAdam(model.parameters()))
    assert_unchanged(before, model)


def with_attribute(model, **attributes):
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "torchrun"),
        (lambda m: get_peft_model(m, LoraConfig(target_modules=["gate"])), "merge_and_unload"),
        (lambda m: with_attribute(m, is_quantized=True), "quantised"),
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: with_attribute(m.get_parameter("lm_head.weight"), ds_id=0) is not None and m, "DeepSpeed"),
    ],
)
def test_set_ups_that_cannot_be_served_are_refused_with_the_way_out(model, wrap, message):
    with pytest.raises(UnsupportedSetupError, match=message):
        compress(wrap(model))


SHARDED = """
import os, sys, torch, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
from hf_compressm import UnsupportedSetupError, compress
from tiny import tiny_lm
from torch.distributed.fsdp import FullyShardedDataParallel
try:
    compress(FullyShardedDataParallel(tiny_lm(), device_id=torch.device("cpu")))
except UnsupportedSetupError as error:
    print("refused:", error)
"""


def test_fsdp1_is_refused(free_port, repo_env):
    command = [sys.executable, "-c", SHARDED, str(free_port)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=repo_env)
    assert "refused: FSDP flattens the parameters" in result.stdout
    assert "hf-compressm reduce" in result.stdout


def test_parameter_groups_cover_every_parameter_once(model):
    groups = ssm_param_groups(model, lr=1e-2, ssm_lr=1e-3, weight_decay=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    by_id = {id(p): group for group in groups for p in group["params"]}
    mixer = model.model.layers[0].mixer
    assert by_id[id(mixer.nu_log)]["lr"] == by_id[id(mixer.C_re)]["lr"] == 1e-3
    assert by_id[id(mixer.B_re)]["weight_decay"] == 0.0
    assert by_id[id(model.model.layers[0].gate.weight)]["weight_decay"] == 0.1
    assert by_id[id(model.model.layers[0].gate.bias)]["weight_decay"] == 0.0


def test_parameter_groups_of_mamba_leave_the_projections_to_the_rest():
    model = ReducibleMambaForCausalLM(ReducibleMambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1))
    groups = ssm_param_groups(model, lr=1e-2, ssm_lr=1e-3, weight_decay=0.1)
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert by_id.keys() == {id(p) for p in model.parameters()}
    mixer = model.backbone.layers[0].mixer
    assert by_id[id(mixer.A_log)]["lr"] == by_id[id(mixer.x_proj.weight)]["lr"] == 1e-3
    for name in ("in_proj", "out_proj", "conv1d"):
        group = by_id[id(mixer.get_submodule(name).weight)]
        assert (group["lr"], group["weight_decay"]) == (1e-2, 0.1)


@pytest.mark.parametrize("earlier", [True, False])
def test_states_from_before_and_after_a_balanced_reduction_take_turns(earlier):
    """Its maps come and go with the weights, in the model and in the optimizer; training goes on bit for bit."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 16}
    model = ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accept_other_sizes(model, optimizer)
    train(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    compress(model, target_state_size=4, optimizer=optimizer, dataloader=[batch()])
    after = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    there, back = (before, after) if earlier else (after, before)
    model.load_state_dict(there[0])
    optimizer.load_state_dict(copy.deepcopy(there[1]))  # which it trains in place
    expected = train(model, optimizer)
    for weights, state in (back, there):
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
        assert model.config.state_size == model.backbone.layers[0].mixer.ssm_state_size
    assert train(model, optimizer) == expected
