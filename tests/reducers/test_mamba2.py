"""Weights of Mamba-2 layers <-> realizations, on stock and on reducible mixers."""

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from hf_compressm.models.mamba2 import ReducibleMamba2Config, ReducibleMamba2ForCausalLM
from hf_compressm.mor import apply_map
from hf_compressm.reducers import find_reducible
from hf_compressm.reducers.mamba2 import Mamba2Reducer, ReducibleMamba2Reducer, RowSelection, mamba2_layer

STOCK, REDUCIBLE = (Mamba2Config, Mamba2ForCausalLM), (ReducibleMamba2Config, ReducibleMamba2ForCausalLM)
EACH = pytest.mark.parametrize("family", [STOCK, REDUCIBLE], ids=["stock", "reducible"])


def model_of(family=STOCK, layers=1, groups=2, **options):
    torch.manual_seed(0)
    make_config, make_model = family
    sizes = {"vocab_size": 30, "hidden_size": 12, "expand": 2, "num_heads": 4, "head_dim": 6, "chunk_size": 16}
    config = make_config(**sizes, state_size=8, n_groups=groups, num_hidden_layers=layers, **options)
    model = make_model(config).double().eval()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.norm.weight += 0.3 * torch.randn(24)
            layer.mixer.in_proj.weight *= 8
            layer.mixer.dt_bias += 2
    return model


def mixer_of(*args, **options):
    return model_of(*args, **options).backbone.layers[0].mixer


def hidden_of(batch=6, length=40, seed=1):
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reducer_of(mixer, method="auto", hidden=None):
    [(_, cls)] = find_reducible(mixer).values()
    reducer = cls(mixer, method)
    reducer.observe((hidden_of() if hidden is None else hidden,), {})
    reducer.spectrum()
    return reducer


@torch.no_grad()
def forward(mixer, hidden):
    return mixer(hidden)


@torch.no_grad()
def output_with(mixer, hidden, B_map, C_map):
    """The mixer's output if its scan read mapped B and C."""
    layer = mamba2_layer(mixer, hidden, None)
    s = layer.signals
    mapped = type(s)(s.x, s.dt, apply_map(B_map, s.B), apply_map(C_map, s.C), s.weight)
    y = plain_outputs(mapped, layer.A) + mixer.D[:, None] * s.x
    gate = mixer.in_proj(hidden)[..., : mixer.intermediate_size]
    return mixer.out_proj(mixer.norm(y.flatten(2), gate))


def plain_outputs(s, A):
    batch, length, heads, head_dim = s.x.shape
    B, C = (v.repeat_interleave(heads // s.groups, 2) for v in (s.B, s.C))
    h, outputs = torch.zeros(batch, heads, head_dim, B.shape[-1], dtype=s.x.dtype), []
    for t in range(length):
        h = torch.exp(s.dt[:, t] * A)[..., None, None] * h
        h = h + (s.dt[:, t, :, None] * s.x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1)


def identity(size=8, groups=2):
    return torch.eye(size, dtype=torch.float64).expand(groups, -1, -1)


@EACH
def test_the_signals_are_those_of_the_layer(family):
    mixer, hidden = mixer_of(family), hidden_of()
    expected = output_with(mixer, hidden, identity(), identity())
    torch.testing.assert_close(forward(mixer, hidden), expected, rtol=1e-5, atol=1e-6)


def test_the_weight_is_the_gain_from_the_scan_to_the_output():
    """With the normalisation held, by hand for one output."""
    mixer, hidden = mixer_of(), hidden_of(2, 5)
    layer = mamba2_layer(mixer, hidden, None)
    gate = mixer.in_proj(hidden)[..., : mixer.intermediate_size]
    sizes = []
    for y in (layer.y + mixer.D[:, None] * layer.signals.x, layer.y):
        gated = (y.flatten(2) * torch.nn.functional.silu(gate))[1, 3].view(2, 12)
        sizes.append((gated.square().mean(-1) + mixer.norm.variance_epsilon).sqrt())
    size = torch.maximum(*sizes)
    d = 17  # head 2, channel 5, in the second group
    gain = torch.nn.functional.silu(gate[1, 3, d]) * mixer.norm.weight[d] / size[1]
    expected = (gain * mixer.out_proj.weight[:, d]).square().sum()
    torch.testing.assert_close(layer.signals.weight[1, 3, 2, 5], expected)


@EACH
def test_selection_computes_with_the_states_that_it_keeps(family):
    mixer, hidden = mixer_of(family), hidden_of()
    reducer = reducer_of(mixer, "selection")
    reduction = reducer.reduce(3)
    assert reduction.method == "selection"
    in_proj = reduction.parameters["in_proj.weight"]
    rows = mixer.in_proj.weight[48 : 48 + 16].view(2, 8, 12)
    kept = torch.stack(
        [(rows[g, :, None] == in_proj[48 + 3 * g : 51 + 3 * g]).all(-1).double().argmax(0) for g in range(2)]
    )
    maps = identity()[0][kept]
    expected = output_with(mixer, hidden, maps, maps)
    reducer.apply(reduction)
    assert reducer.state_size == 3
    torch.testing.assert_close(forward(mixer, hidden), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_balanced_maps_compute_the_projection(groups):
    mixer, hidden = mixer_of(REDUCIBLE, groups=groups), hidden_of()
    reducer = reducer_of(mixer)
    reduction = reducer.reduce(3)
    expected = output_with(mixer, hidden, reduction.parameters["B_map"], reduction.parameters["C_map"])
    reducer.apply(reduction)
    assert (mixer.state_size, mixer.conv_channels) == (3, 8)
    torch.testing.assert_close(forward(mixer, hidden), expected, rtol=1e-9, atol=1e-11)
    assert [layer.state_size for layer in mixer.config.per_layer_config] == [3]


@pytest.mark.parametrize("method", ["balanced", "selection"])
def test_a_second_reduction_composes_with_the_first(method):
    mixer, hidden = mixer_of(REDUCIBLE), hidden_of()
    first = reducer_of(mixer)
    first.apply(first.reduce(6))
    old = [map_.detach().clone() for map_ in (mixer.B_map, mixer.C_map)]
    second = reducer_of(mixer, method)
    reduction = second.reduce(3)
    found = [reduction.parameters[name] for name in ("B_map", "C_map")]
    steps = [new @ torch.linalg.pinv(map_) for new, map_ in zip(found, old, strict=True)]
    for new, step, map_ in zip(found, steps, old, strict=True):
        torch.testing.assert_close(step @ map_, new)
    expected = output_with(mixer, hidden, *steps)
    second.apply(reduction)
    assert mixer.B_map.shape == (2, 3, 8)
    torch.testing.assert_close(forward(mixer, hidden), expected, rtol=1e-8, atol=1e-10)


def test_the_relative_error_is_that_of_the_weighted_outputs_held_out():
    mixer = mixer_of(REDUCIBLE)
    held_out = hidden_of()[1::2]
    for method in ("balanced", "selection"):
        reduction = reducer_of(mixer, method).reduce(3)
        reducer = reducer_of(mixer, method)
        with torch.no_grad():
            full = mamba2_layer(mixer, held_out, None)
            reducer.apply(reduction)
            small = mamba2_layer(mixer, held_out, None)
        error = (full.signals.weight * (small.y - full.y).square()).sum()
        expected = (error / (full.signals.weight * full.y.square()).sum()).sqrt()
        assert abs(reduction.relative_error - float(expected)) < 1e-8
        mixer = mixer_of(REDUCIBLE)


def test_balancing_loses_less_than_selection():
    mixer = nearly_redundant(mixer_of(REDUCIBLE), 0.2)
    for states in (6, 4):
        balanced, selected = (
            reducer_of(mixer, method, hidden_of(12)).reduce(states) for method in ("balanced", "selection")
        )
        assert 0 < balanced.relative_error < 0.8 * selected.relative_error


@torch.no_grad()
def nearly_redundant(mixer, noise):
    """Let the channels of B move in pairs, behind the convolution as well."""
    parts = [(mixer.in_proj.weight, 48), (mixer.conv1d.weight, 24), (mixer.conv1d.bias, 24)]
    for param, rows in parts:
        for first in (rows, rows + 8):
            pair = param[first : first + 4]
            param[first + 4 : first + 8] = pair + noise * pair.std() * torch.randn_like(pair)
    return mixer


def test_redundant_states_are_removed_without_error():
    mixer = nearly_redundant(mixer_of(REDUCIBLE), 0.0)
    before = forward(mixer, hidden_of(seed=2))
    reducer = reducer_of(mixer)
    reduction = reducer.reduce(4)
    assert reduction.relative_error < 1e-6
    reducer.apply(reduction)
    torch.testing.assert_close(forward(mixer, hidden_of(seed=2)), before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["balanced", "selection"])
def test_a_reduction_to_all_states_changes_nothing(method):
    mixer = mixer_of(REDUCIBLE)
    before = forward(mixer, hidden_of())
    reducer = reducer_of(mixer, method)
    reduction = reducer.reduce(8)
    assert reduction.relative_error < 1e-12
    reducer.apply(reduction)
    torch.testing.assert_close(forward(mixer, hidden_of()), before, rtol=1e-9, atol=1e-11)


def test_a_reduced_stock_model_is_a_stock_model(tmp_path):
    model = model_of(layers=2, use_bias=True)
    ids = torch.randint(0, 30, (4, 20))
    for module, cls in find_reducible(model).values():
        assert cls is Mamba2Reducer
        assert cls.uniform
        reducer = cls(module)
        reducer.observe((hidden_of(),), {})
        reducer.spectrum()
        reducer.apply(reducer.reduce(4))
        reducer.sync_config(model.config)
    model.save_pretrained(tmp_path)
    again = Mamba2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.state_size == 4
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    longer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert longer.shape == (4, 23)


def test_a_trial_can_be_taken_back():
    """As the search by loss does: the old parameters, without maps, put the layer back."""
    mixer = mixer_of(REDUCIBLE)
    before = forward(mixer, hidden_of())
    state = {name: value.clone() for name, value in mixer.state_dict().items()}
    reducer = reducer_of(mixer)
    trial = reducer.reduce(3)
    reducer.apply(trial)
    old = type(trial)(8, {name: state[name] for name in trial.parameters if name in state}, [], "balanced", 0.0)
    reducer.apply(old)
    assert mixer.B_map is None
    assert torch.equal(forward(mixer, hidden_of()), before)


def test_gradients_follow_a_second_reduction_where_nothing_is_lost():
    mixer, hidden = mixer_of(REDUCIBLE, groups=1), hidden_of(seed=2)
    first = reducer_of(mixer)
    first.apply(first.reduce(6))
    with torch.no_grad():
        mixer.B_map[:, 3:] = 0.5 * mixer.B_map[:, :3]
    goal = torch.randn_like(hidden)
    second = reducer_of(mixer)
    mixer(hidden).mul(goal).sum().backward()
    old = {name: getattr(mixer, name).grad.clone() for name in ("B_map", "C_map")}
    reduction = second.reduce(3)
    second.apply(reduction)
    mixer(hidden).mul(goal).sum().backward()
    for gradient_map in reduction.gradient_maps:
        (name,) = gradient_map.names
        (mapped,) = gradient_map.apply([old[name]])
        torch.testing.assert_close(getattr(mixer, name).grad, mapped, rtol=1e-4, atol=1e-6 * float(mapped.abs().max()))
    assert len(reduction.gradient_maps) == 2


def test_gradients_of_selected_channels_are_selected():
    reduction = reducer_of(mixer_of()).reduce(3)
    maps = {gradient_map.names[0]: gradient_map for gradient_map in reduction.gradient_maps}
    assert maps.keys() == reduction.parameters.keys() == {"in_proj.weight", "conv1d.weight", "conv1d.bias"}
    mixer = mixer_of()
    for name, gradient_map in maps.items():
        (selected,) = gradient_map.apply([mixer.get_parameter(name).detach()])
        assert torch.equal(selected, reduction.parameters[name])
        (squared,) = gradient_map.apply([mixer.get_parameter(name).detach()], squared=True)
        assert torch.equal(squared, selected)  # of something that is a square already
    assert all(isinstance(gradient_map, RowSelection) for gradient_map in maps.values())


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_observed(family, side):
    mixer, hidden = mixer_of(family), hidden_of()
    plain = reducer_of(mixer, hidden=hidden)
    pads = torch.full((6, 9, 12), 3.0, dtype=torch.float64)
    mask = torch.ones(6, 49, dtype=torch.long)
    mask[:, slice(0, 9) if side == "left" else slice(40, None)] = 0
    with_padding = type(plain)(mixer)
    together = torch.cat([pads, hidden] if side == "left" else [hidden, pads], 1)
    with_padding.observe((), {"hidden_states": together, "attention_mask": mask})
    found, expected = with_padding.statistics(), plain.statistics()
    assert found.keys() == expected.keys()
    for name in found.keys() - {"sampled"}:  # where padding takes room
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_stock_layers_know_no_balancing():
    with pytest.raises(ValueError, match="Mamba2Mixer layers have no method 'balanced'"):
        Mamba2Reducer(mixer_of(), "balanced")
    assert ReducibleMamba2Reducer(mixer_of(REDUCIBLE)).method == "balanced"


def test_inputs_that_are_not_finite_are_refused():
    hidden = hidden_of()
    hidden[0, 3] = torch.nan
    reducer = Mamba2Reducer(mixer_of())
    with pytest.raises(ArithmeticError, match="observed"):
        reducer.spectrum()
    reducer.observe((hidden,), {})
    with pytest.raises(ArithmeticError, match="finite"):
        reducer.spectrum()


def test_a_balanced_reduction_of_packed_sequences_is_left_undone():
    """The kernels that know `seq_idx` would not take them through the maps."""
    numbers = torch.zeros(6, 40, dtype=torch.int32)
    for method, refused in (("balanced", True), ("selection", False)):
        reducer = ReducibleMamba2Reducer(mixer_of(REDUCIBLE), method)
        reducer.observe((hidden_of(),), {"seq_idx": numbers})
        if refused:
            with pytest.raises(ArithmeticError, match='method="selection"'):
                reducer.spectrum()
        else:
            assert reducer.spectrum().hsv.shape == (8,)
