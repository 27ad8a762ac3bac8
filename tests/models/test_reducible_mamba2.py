"""What only Mamba-2 has: maps after the convolution, groups, limits of the time step, packed sequences."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from hf_compressm.models import ReducibleMamba2Config, ReducibleMamba2ForCausalLM, layer_state_sizes
from hf_compressm.models.mamba2 import modeling_reducible_mamba2

SIZES = {"vocab_size": 32, "hidden_size": 12, "state_size": 8, "num_hidden_layers": 3}
SIZES |= {"num_heads": 4, "head_dim": 6, "n_groups": 2, "chunk_size": 4}


def mixers(model):
    return [layer.mixer for layer in model.base_model.layers]


def conv_sizes(config):
    return [layer.conv_state_size for layer in config.per_layer_config]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def stock_mixer(mixer, **options):
    """A stock mixer with the convolution of `mixer` and its weights, maps excepted."""
    stock = Mamba2Mixer(Mamba2Config(**(SIZES | {"state_size": mixer.conv_channels} | options)), mixer.layer_idx)
    state = {name: value for name, value in mixer.state_dict().items() if not name.endswith("_map")}
    stock.load_state_dict(state)
    return stock


@pytest.mark.parametrize("layer_idx", [1, 2])
def test_each_mixer_without_maps_is_a_stock_mixer_of_its_size(make_reducible, layer_idx):
    mixer = mixers(make_reducible("mamba2"))[layer_idx]
    assert mixer.B_map is mixer.C_map is None
    hidden_states = torch.randn(2, 9, 12)
    close(mixer(hidden_states), stock_mixer(mixer)(hidden_states))


def test_dual_maps_change_nothing(make_reducible):
    """B' = W^T B and C' = V^T C with W^T V = I, here square: the output is that without maps."""
    model = make_reducible("mamba2", state_size=8, conv_state_size=8, per_layer_config=None)
    mixer, hidden_states = mixers(model)[1], torch.randn(2, 9, 12)
    with torch.no_grad():
        mixer.B_map.normal_()
        mixer.C_map.copy_(torch.linalg.inv(mixer.B_map.double()).transpose(1, 2))
    torch.testing.assert_close(mixer(hidden_states), stock_mixer(mixer)(hidden_states), rtol=1e-3, atol=1e-4)


def test_maps_that_select_are_a_mixer_of_the_selected_states(make_reducible):
    mixer = mixers(make_reducible("mamba2 with maps"))[0]
    kept = torch.tensor([[0, 2, 3, 4, 6], [1, 2, 3, 5, 6]])  # of 7, in each group
    with torch.no_grad():
        for map_ in (mixer.B_map, mixer.C_map):
            map_.copy_(nn.functional.one_hot(kept, 7))
    small = Mamba2Mixer(Mamba2Config(**(SIZES | {"state_size": 5})), 0)
    groups = torch.arange(2)[:, None] * 7
    channels = torch.cat([torch.arange(24), (24 + groups + kept).flatten(), (24 + 14 + groups + kept).flatten()])
    rows = torch.cat([torch.arange(24), 24 + channels, 24 + 24 + 28 + torch.arange(4)])
    state = {name: value for name, value in mixer.state_dict().items() if not name.endswith("_map")}
    state |= {"in_proj.weight": state["in_proj.weight"][rows]}
    state |= {f"conv1d.{kind}": state[f"conv1d.{kind}"][channels] for kind in ("weight", "bias")}
    small.load_state_dict(state)
    hidden_states = torch.randn(2, 9, 12)
    close(mixer(hidden_states), small(hidden_states))


def test_new_maps_start_as_a_selection():
    model = ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, conv_state_size=9))
    for mixer in mixers(model):
        for map_ in (mixer.B_map, mixer.C_map):
            assert torch.equal(map_, torch.eye(8, 9).expand(2, 8, 9))


@pytest.mark.parametrize("conv_state_size", [7, 0])
def test_channels_fewer_than_states_are_refused(conv_state_size):
    with pytest.raises(StrictDataclassError, match="conv_state_size of layer 0 to be None or at least its state_size"):
        ReducibleMamba2Config(**SIZES, conv_state_size=conv_state_size)


def test_heads_that_do_not_fit_are_refused_with_unequal_sizes_too():
    with pytest.raises(StrictDataclassError, match="must equal num_heads"):
        ReducibleMamba2Config(**(SIZES | {"num_heads": 5}), per_layer_config={1: {"state_size": 4}})


# Resizing


def test_a_layer_gets_maps_and_keeps_its_convolution(make_reducible, tokens, tmp_path):
    model = make_reducible("mamba2", per_layer_config=None).train()
    mixer = mixers(model)[1]
    kept = {name: (param, param.detach().clone()) for name, param in mixer.named_parameters()}
    model(tokens, labels=tokens).loss.backward()
    mixer.resize_state(3, conv_state_size=8)
    assert (mixer.state_size, mixer.conv_state_size) == (3, 8)
    assert layer_state_sizes(model.config) == [8, 3, 8]
    assert conv_sizes(model.config) == [None, 8, None]
    for name, param in mixer.named_parameters():
        if name.endswith("_map"):
            assert param.shape == (2, 3, 8)
            assert not param.any()
        else:
            assert param is kept[name][0]
            assert torch.equal(param, kept[name][1])
    with torch.no_grad():
        mixer.B_map.normal_()
        mixer.C_map.normal_()
    model(tokens, labels=tokens).loss.backward()
    assert mixer.B_map.grad.any()
    maps = mixer.B_map, mixer.C_map
    mixer.resize_state(2)
    assert (mixer.B_map, mixer.C_map) == maps
    assert mixer.C_map.shape == (2, 2, 8)
    assert (mixer.state_size, mixer.conv_state_size) == (2, 8)
    with pytest.raises(ValueError, match="at most conv_state_size=8, found 9"):
        mixer.resize_state(9)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False}])
def test_a_layer_without_maps_is_cut_in_its_rows(make_reducible, tokens, tmp_path, options):
    model = make_reducible("mamba2", per_layer_config=None, **options).train()
    mixer = mixers(model)[1]
    kept, before = dict(mixer.named_parameters()), copy.deepcopy(mixer.state_dict())
    model(tokens, labels=tokens).loss.backward()
    mixer.resize_state(3)
    assert layer_state_sizes(model.config) == [8, 3, 8]
    assert conv_sizes(model.config) == [None] * 3
    assert all(kept[name] is param for name, param in mixer.named_parameters())
    assert mixer.in_proj.weight.shape == (mixer.in_proj.out_features, 12) == (24 + 24 + 12 + 4, 12)
    assert mixer.conv1d.weight.shape == (mixer.conv1d.groups, 1, 4) == (mixer.conv_dim, 1, 4) == (24 + 12, 1, 4)
    assert torch.equal(mixer.in_proj.weight[:48], before["in_proj.weight"][:48])
    assert torch.equal(mixer.in_proj.weight[-4:], before["in_proj.weight"][-4:])
    assert torch.equal(mixer.conv1d.weight[:24], before["conv1d.weight"][:24])
    assert not mixer.in_proj.weight[48:-4].any()
    assert not mixer.conv1d.weight[24:].any()
    with torch.no_grad():
        mixer.in_proj.weight.normal_()
        mixer.conv1d.weight.normal_()
    model(tokens, labels=tokens).loss.backward()
    hidden_states = torch.randn(2, 9, 12)
    close(mixer(hidden_states), stock_mixer(mixer, **options)(hidden_states))
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


# Loading

PLAIN, MAPPED, DEEPER = {}, {1: {"state_size": 5, "conv_state_size": 8}}, {1: {"state_size": 2, "conv_state_size": 8}}
OTHER, CUT = {1: {"state_size": 3, "conv_state_size": 6}}, {1: {"state_size": 4}}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("own", "other"),
    [(PLAIN, MAPPED), (MAPPED, PLAIN), (MAPPED, DEEPER), (DEEPER, OTHER), (OTHER, CUT), (CUT, MAPPED)],
)
def test_state_dicts_with_and_without_maps(make_reducible, tokens, own, other, assign):
    target, source = (make_reducible("mamba2", per_layer_config=layers) for layers in (own, other))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(tokens).logits, source(tokens).logits)
    assert layer_state_sizes(target.config) == layer_state_sizes(source.config)
    assert conv_sizes(target.config) == conv_sizes(source.config)
    assert list(target.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("in_proj.weight", (68, 12)),
        ("in_proj.weight", (81, 12)),
        ("conv1d.weight", (40, 1, 4)),
        ("B_map", (2, 4, 7)),
        ("C_map", (1, 5, 7)),
        ("C_map", (2, 5)),
    ],
)
def test_tensors_that_disagree_are_the_ordinary_error(make_reducible, name, shape):
    target, state = make_reducible("mamba2 with maps"), make_reducible("mamba2 with maps").state_dict()
    state[f"backbone.layers.0.mixer.{name}"] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\.layers\.0\.mixer"):
        target.load_state_dict(state)
    assert (mixers(target)[0].state_size, mixers(target)[0].conv_state_size) == (5, 7)


def test_maps_that_the_config_does_not_have_are_an_error(make_reducible, tmp_path):
    make_reducible("mamba2", per_layer_config={1: {"conv_state_size": 8}}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"per_layer_config": None}))
    with pytest.raises(ValueError, match=r"layers\.1\.mixer\.B_map: in the checkpoint only"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# Time steps and packed sequences


@pytest.mark.parametrize("limit", [(0.0, 0.3), (0.4, 0.6)])
def test_limits_of_the_time_step_hold_in_decoding_and_not_for_padding(make_reducible, tokens, limit):
    model = make_reducible("mamba2 with maps", time_step_limit=limit)
    unlimited = make_reducible("mamba2 with maps")
    unlimited.load_state_dict(model.state_dict())
    whole = model(tokens)
    assert (whole.logits - unlimited(tokens).logits).abs().max() > 1e-2
    cache = None
    for t in range(11):
        out = model(tokens[:, t : t + 1], cache=cache)
        cache = out.cache
        torch.testing.assert_close(out.logits, whole.logits[:, t : t + 1], rtol=1e-4, atol=1e-4)
    padded = torch.cat([tokens, torch.full((3, 2), 7)], 1)
    mask = (torch.arange(13) < 11).expand(3, 13)
    cache = model(padded, attention_mask=mask).cache
    for layer, expected in zip(cache.layers, whole.cache.layers, strict=True):
        torch.testing.assert_close(layer.recurrent_states[0], expected.recurrent_states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_without_a_kernel_are_refused(make_reducible, tokens, name):
    with pytest.raises(ValueError, match=f"no packed sequences, found {name}"):
        make_reducible("mamba2").base_model(tokens, **{name: torch.zeros(1, 11, dtype=torch.int32)})


# Kernels: a meta device stands for a GPU


@pytest.fixture
def kernels(monkeypatch):
    """Records which kernels of transformers were asked for; they find nothing."""
    asked = []

    def spy(name):
        real = getattr(modeling_reducible_mamba2, name)
        monkeypatch.setattr(
            modeling_reducible_mamba2, name, lambda *args, **kwargs: (asked.append(name), real(*args, **kwargs))[1]
        )

    for name in ("mamba2_split_conv1d_scan_combined", "scan_kernel", "causal_conv1d_fn"):
        spy(name)
    return asked


def test_kernels_are_left_to_transformers_and_the_fused_one_not_where_there_are_maps(make_reducible, tokens, kernels):
    model = make_reducible("mamba2 with maps").train()
    model(tokens)
    assert kernels == []
    model, tokens = model.to("meta"), tokens.to("meta")
    model(tokens)
    mapped, plain = ["causal_conv1d_fn", "scan_kernel"], "mamba2_split_conv1d_scan_combined"
    assert kernels == [*mapped, plain, *mapped, plain, *mapped]
    kernels.clear()
    cache = model.eval()(tokens).cache
    assert kernels == mapped * 3
    kernels.clear()
    model(tokens, cache=cache)  # the kernel goes on from a state
    assert kernels == mapped * 3


def test_a_fused_kernel_is_the_whole_mixer(make_reducible, tokens, monkeypatch):
    model = make_reducible("mamba2").train().to("meta")
    seen = []

    def fused(projected, *args, headdim, ngroups, outproj_weight, **options):
        seen.append(projected.shape[-1])
        return projected.new_zeros(*projected.shape[:2], outproj_weight.shape[0])

    monkeypatch.setattr(modeling_reducible_mamba2, "mamba2_split_conv1d_scan_combined", fused)
    monkeypatch.setattr(modeling_reducible_mamba2, "scan_kernel", None)
    model(tokens.to("meta"))
    assert seen == [52 + 4 * n for n in (5, 8, 3)]
