"""Weights of Mamba layers <-> realizations, on stock and on reducible mixers."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from hf_compressm.models.mamba import ReducibleMambaConfig, ReducibleMambaForCausalLM
from hf_compressm.mor import SelectiveSignals, balance, selective
from hf_compressm.reducers import find_reducible, observing
from hf_compressm.reducers import mamba as mamba_reducers
from hf_compressm.reducers.mamba import MambaReducer, ReducibleMambaReducer, mamba_signals
from hf_compressm.reducers.refused import refuse_layers

STOCK, REDUCIBLE = (MambaConfig, MambaForCausalLM), (ReducibleMambaConfig, ReducibleMambaForCausalLM)


def model_of(family=STOCK, state_size=8, layers=1, seed=0):
    """A tiny model whose layers do something: decay rates differ between the channels, and steps are long."""
    torch.manual_seed(seed)
    make_config, make_model = family
    config = make_config(vocab_size=30, hidden_size=12, state_size=state_size, num_hidden_layers=layers)
    model = make_model(config).double().eval()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log += 0.3 * torch.randn_like(layer.mixer.A_log)
            layer.mixer.dt_proj.bias += 2
            layer.mixer.x_proj.weight *= 5
    return model


def mixer_of(*args, **options):
    return model_of(*args, **options).backbone.layers[0].mixer


def hidden_of(batch=6, length=40, seed=1):
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reducer_of(mixer, method="auto", hidden=None, **options):
    [(_, cls)] = find_reducible(mixer).values()
    reducer = cls(mixer, method, **options)
    reducer.observe((hidden_of() if hidden is None else hidden,), {})
    reducer.spectrum()
    return reducer


@torch.no_grad()
def forward(mixer, hidden):
    return mixer(hidden)


def redundant(mixer):
    """Make each state of the second half decay and be driven as one of the first."""
    n, first = mixer.ssm_state_size, mixer.time_step_rank
    with torch.no_grad():
        mixer.A_log[:, n // 2 :] = mixer.A_log[:, : n // 2]
        rows = mixer.x_proj.weight[first : first + n]
        rows[n // 2 :] = torch.linspace(-2, 3, n // 2, dtype=rows.dtype)[:, None] * rows[: n // 2]
    return mixer


@pytest.mark.parametrize("family", [STOCK, REDUCIBLE], ids=["stock", "reducible"])
def test_the_signals_are_those_of_the_layer(family):
    mixer, hidden = mixer_of(family), hidden_of()
    with torch.no_grad():
        signals = mamba_signals(mixer, hidden, None)
        gate = mixer.in_proj(hidden).chunk(2, -1)[1]
        y = selective.outputs(signals, -mixer.A_log.exp()) + mixer.D * signals.u
        torch.testing.assert_close(mixer.out_proj(y * silu(gate)), mixer(hidden))
    # the weight is the squared length of what one output adds to the layer's output
    channel = (silu(gate[2, 5, 3]) * mixer.out_proj.weight[:, 3]).square().sum()
    torch.testing.assert_close(signals.weight[2, 5, 3], channel.detach())


@pytest.mark.parametrize("method", ["balanced", "selection"])
@pytest.mark.parametrize("family", [STOCK, REDUCIBLE], ids=["stock", "reducible"])
def test_the_weights_compute_the_projected_realization(family, method):
    mixer, hidden = mixer_of(family), hidden_of()
    reducer = reducer_of(mixer, method)
    with torch.no_grad():
        full = mamba_signals(mixer, hidden, None)
    P, Q = reducer._gramians()
    found = selective.reduce_selective(P, Q, balance(P, Q), calibration(reducer), 3, method)
    small = SelectiveSignals(full.u, full.delta, full.B @ found.W, full.C @ found.M.T, full.weight)
    reduction = reducer.reduce(3)
    reducer.apply(reduction)
    assert (reduction.method, reduction.relative_error) == (found.method, found.relative_error)
    assert reduction.state_size == reducer.state_size == mixer.A_log.shape[1] == 3
    with torch.no_grad():
        gate = mixer.in_proj(hidden).chunk(2, -1)[1]
        y = selective.outputs(small, found.A) + mixer.D * full.u
        # the stock mixer takes the exponential of A_log in float32
        precision = 1e-6 if family is STOCK else 1e-9
        expected = mixer.out_proj(y * silu(gate))
        torch.testing.assert_close(mixer(hidden), expected, rtol=precision, atol=1e-2 * precision)


def calibration(reducer):
    reducer.reduce(reducer.state_size)
    return reducer._calibration


def test_a_reduced_stock_model_is_a_stock_model(tmp_path):
    model = model_of(layers=2)
    reducers = [cls(module) for module, cls in find_reducible(model).values()]
    assert all(reducer.uniform for reducer in reducers)
    ids = torch.randint(0, 30, (4, 20))
    for reducer in reducers:
        reducer.observe((hidden_of(),), {})
        reducer.spectrum()
        reducer.apply(reducer.reduce(4))
    model.save_pretrained(tmp_path)
    again = MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.state_size == 4
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    longer = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(longer, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))


def test_layers_of_a_reducible_model_may_differ():
    model = model_of(REDUCIBLE, layers=2)
    reducer = reducer_of(model.backbone.layers[1].mixer)
    assert not reducer.uniform
    reducer.apply(reducer.reduce(3))
    assert [layer.mixer.state_size for layer in model.backbone.layers] == [8, 3]
    assert [layer.state_size for layer in model.config.per_layer_config] == [8, 3]
    assert model(torch.randint(0, 30, (2, 9))).logits.isfinite().all()


def test_redundant_states_are_removed_without_error():
    mixer = redundant(mixer_of())
    before = forward(mixer, hidden_of(seed=2))
    reducer = reducer_of(mixer)
    reduction = reducer.reduce(4)
    assert reduction.relative_error < 1e-6
    assert reduction.energy_discarded < 1e-6
    reducer.apply(reduction)
    torch.testing.assert_close(forward(mixer, hidden_of(seed=2)), before, rtol=1e-6, atol=1e-8)


def test_a_reduction_to_all_states_changes_nothing():
    mixer = mixer_of(REDUCIBLE)
    before = forward(mixer, hidden_of())
    reducer = reducer_of(mixer)
    reduction = reducer.reduce(8)
    assert reduction.relative_error == reduction.energy_discarded == 0
    reducer.apply(reduction)
    torch.testing.assert_close(forward(mixer, hidden_of()), before, rtol=1e-12, atol=1e-14)


def test_errors_grow_as_states_go():
    reducer = reducer_of(mixer_of())
    found = [reducer.reduce(r) for r in (6, 4, 2, 1)]
    errors = [each.relative_error for each in found]
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[-1] < 1
    assert reducer_of(mixer_of(), "selection").reduce(4).relative_error >= errors[1]


def test_rows_for_b_and_c_have_the_same_norms():
    reducer = reducer_of(mixer_of())
    weight = reducer.reduce(4).parameters["x_proj.weight"]
    _, rows_B, rows_C = weight.split([reducer.module.time_step_rank, 4, 4])
    torch.testing.assert_close(rows_B.norm(dim=1), rows_C.norm(dim=1))


def test_gradients_follow_their_map_where_nothing_is_lost():
    """Without loss, the gradient of the reduced weights is the image of the old gradient."""
    mixer, hidden = redundant(mixer_of()), hidden_of(seed=2)
    goal = torch.randn_like(hidden)
    reducer = reducer_of(mixer)
    mixer(hidden).mul(goal).sum().backward()
    old = mixer.x_proj.weight.grad.clone()
    reduction = reducer.reduce(4)
    (gradient_map,) = reduction.gradient_maps
    reducer.apply(reduction)
    mixer(hidden).mul(goal).sum().backward()
    (mapped,) = gradient_map.apply([old])
    torch.testing.assert_close(mixer.x_proj.weight.grad, mapped, rtol=1e-4, atol=1e-7 * float(old.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [STOCK, REDUCIBLE], ids=["stock", "reducible"])
def test_padding_is_not_observed(family, side):
    mixer, hidden = mixer_of(family), hidden_of()
    plain = reducer_of(mixer, hidden=hidden)
    pads = torch.full((6, 9, 12), 3.0, dtype=torch.float64)
    together = torch.cat([pads, hidden] if side == "left" else [hidden, pads], 1)
    mask = torch.ones(6, 49, dtype=torch.long)
    mask[:, slice(0, 9) if side == "left" else slice(40, None)] = 0
    with_padding = next(cls(module) for module, cls in find_reducible(mixer).values())
    with_padding.observe((together,), {"attention_mask": mask})
    found, expected = with_padding.statistics(), plain.statistics()
    assert found.keys() == expected.keys()
    for name in found.keys() - {"sampled"}:  # where padding takes room
        if name != "sum.Q":  # other signs
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_packed_sequences_are_taken_apart():
    mixer = mixer_of()
    parts = [hidden_of(1, length, seed=length) for length in (9, 14, 7)]
    numbers = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([9, 14, 7]))[None]
    packed, apart = MambaReducer(mixer), MambaReducer(mixer)
    packed.observe((torch.cat(parts, 1),), {"seq_idx": numbers})
    for part in parts:
        apart.observe((part,), {})
    torch.testing.assert_close(packed.statistics()["sum.P"], apart.statistics()["sum.P"])
    for i, part in enumerate(parts):
        assert torch.equal(packed.statistics()[f"sample.{i}"], part[0])


def test_an_interrupted_observation_goes_on_exactly():
    mixer = mixer_of()
    batches = [hidden_of(seed=seed) for seed in range(4)]
    whole, first, second = (MambaReducer(mixer, seed=3) for _ in range(3))
    for hidden in batches:
        whole.observe((hidden,), {})
    for hidden in batches[:2]:
        first.observe((hidden,), {})
    second.load_statistics(first.statistics())
    for hidden in batches[2:]:
        second.observe((hidden,), {})
    found, expected = second.statistics(), whole.statistics()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("batch", "length"), [(2, 40), (1, 40), (2, 700)])
def test_two_ranks_observe_what_one_process_would(batch, length):
    """Signs of the adjoint, sums and sample, whose bounds cut it."""
    mixer, batches = mixer_of(), [hidden_of(2 * batch, length, seed) for seed in range(3)]
    one, *both = (MambaReducer(mixer) for _ in range(3))
    for rank, reducer in enumerate(both):
        reducer.rank, reducer.ranks = rank, 2
    for hidden in batches:
        one.observe((hidden,), {})
        for reducer, part in zip(both, hidden.chunk(2), strict=True):
            reducer.observe((part,), {})
    both[0].reduce_over_ranks(SimpleNamespace(gather=lambda value: [value, both[1].statistics()]))
    found, expected = both[0].statistics(), one.statistics()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_what_is_kept_is_bounded():
    reducer = MambaReducer(mixer_of())
    for seed in range(4):
        reducer.observe((hidden_of(3, 700, seed),), {})
    kept = reducer.statistics()
    lengths = [len(value) for name, value in kept.items() if name.startswith("sample.")]
    assert max(lengths) <= observing._SAMPLE_LENGTH
    assert sum(lengths) <= observing._SAMPLE_TOTAL
    assert kept["sum.P"].shape == kept["sum.Q"].shape == (8, 8)


def test_fewer_channels_are_observed_where_all_would_be_too_much(monkeypatch):
    mixer, batches = mixer_of(), [hidden_of(seed=seed) for seed in range(12)]

    def gramians():
        reducer = MambaReducer(mixer)
        for hidden in batches:
            reducer.observe((hidden,), {})
        return reducer._gramians()

    whole = gramians()
    monkeypatch.setattr(mamba_reducers, "_STATES_PER_PASS", batches[0].shape[0] * 40 * 24 * 8 // 4)
    for found, expected in zip(gramians(), whole, strict=True):
        assert 0 < (found - expected).norm() < 0.4 * expected.norm()


def test_the_global_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    first, second = (reducer_of(mixer_of_state(state)) for _ in range(2))
    for name, value in first.statistics().items():
        assert torch.equal(value, second.statistics()[name])
    assert torch.equal(first.reduce(3).parameters["A_log"], second.reduce(3).parameters["A_log"])
    before = torch.get_rng_state()
    reducer_of(first.module).reduce(3)
    assert torch.equal(torch.get_rng_state(), before)


def mixer_of_state(state):
    mixer = mixer_of()
    torch.set_rng_state(state)
    torch.rand(3)
    return mixer


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_single_short_sequence_is_enough(length):
    reducer = reducer_of(mixer_of(), hidden=hidden_of(1, length))
    assert all(p.isfinite().all() for p in reducer.reduce(2).parameters.values())


def test_bfloat16_is_observed_in_float32():
    mixer = mixer_of().to(torch.bfloat16)
    reducer = reducer_of(mixer, hidden=hidden_of().bfloat16())
    reducer.apply(reducer.reduce(3))
    assert mixer.x_proj.weight.dtype == torch.bfloat16
    assert forward(mixer, hidden_of().bfloat16()).isfinite().all()


def test_without_an_observation_there_is_no_spectrum():
    with pytest.raises(ArithmeticError, match="observed"):
        MambaReducer(mixer_of()).spectrum()


def test_inputs_that_are_not_finite_are_refused():
    hidden = hidden_of()
    hidden[0, 3] = torch.nan
    reducer = MambaReducer(mixer_of())
    reducer.observe((hidden,), {})
    with pytest.raises(ArithmeticError, match="finite"):
        reducer.spectrum()


def test_layers_with_norms_after_the_projection_are_refused_by_name():
    config = FalconMambaConfig(vocab_size=30, hidden_size=12, state_size=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match="FalconMambaMixer, which normalises B and C"):
        refuse_layers(FalconMambaForCausalLM(config))
    refuse_layers(model_of())


def test_reducers_are_found_by_class():
    found = {cls for model in (model_of(), model_of(REDUCIBLE)) for _, cls in find_reducible(model).values()}
    assert found == {MambaReducer, ReducibleMambaReducer}
