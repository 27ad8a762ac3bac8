"""Weights of the MIMO SSM <-> realizations."""

import pytest
import torch
from tiny import tiny_lm

from hf_compressm.reducers import find_reducible
from hf_compressm.reducers.mimo_ssm import MimoSSMReducer


def mixer_of(**options):
    return tiny_lm(layers=1, **options).model.layers[0].mixer


def impulse_response(mixer, steps=60):
    u = torch.zeros(mixer.D.shape[0], steps, mixer.D.shape[0])
    u[torch.arange(len(u)), 0, torch.arange(len(u))] = 1
    with torch.no_grad():
        return mixer(u)


def reduce_in_place(mixer, states, method="auto"):
    reducer = MimoSSMReducer(mixer, method)
    reducer.spectrum()
    reduction = reducer.reduce(states)
    reducer.apply(reduction)
    return reduction


@pytest.mark.parametrize("method", ["balanced", "complex"])
def test_the_weights_compute_the_reduced_system(method):
    """Through gain, scaling, logarithms and the layer's own forward pass."""
    mixer = mixer_of(state_size=24, hidden_size=6, r_min=0.4, r_max=0.95)
    reducer = MimoSSMReducer(mixer, method)
    reducer.spectrum()
    system = reducer._balancing.reduce(10).system
    reducer.apply(reducer.reduce(10))
    powers = system.lam[:, None] ** torch.arange(60)
    expected = torch.einsum("pn,nt,nm->mtp", system.C, powers, system.B).real
    found = impulse_response(mixer).double()
    direct = torch.diag(mixer.D.detach().double())
    expected[:, 0] += direct
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rows_of_b_have_the_norm_of_the_initialisation():
    mixer = mixer_of(state_size=48, hidden_size=8)
    reduce_in_place(mixer, 16)
    norms = (mixer.B_re.square() + mixer.B_im.square()).sum(dim=1).sqrt()
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-5, atol=1e-5)


def test_real_modes_get_a_gradient_and_change_nothing():
    """A layer with real dynamics has real modes, where θ, Im B and Im C have no gradient unless Im C is free."""
    mixer = mixer_of(state_size=24, hidden_size=4, r_min=0.2, r_max=0.9)
    with torch.no_grad():
        mixer.theta.zero_()
        mixer.B_im.zero_()
        mixer.C_im.zero_()
    reduction = reduce_in_place(mixer, 6)
    real = reduction.parameters["B_im"].abs().sum(dim=1) == 0
    assert real.any()
    before = impulse_response(mixer)
    free = mixer.C_im[:, real].detach().clone()
    assert (free != 0).all()
    assert free.abs().max() < 0.1 * mixer.C_re.abs().max()
    mixer(torch.randn(2, 20, 4)).square().sum().backward()
    assert (mixer.B_im.grad[real] != 0).any()
    assert (mixer.theta.grad[real] != 0).any()
    with torch.no_grad():
        mixer.C_im[:, real] = 0
    torch.testing.assert_close(impulse_response(mixer), before, rtol=1e-5, atol=1e-6)


def test_the_free_values_depend_on_the_seed_alone():
    mixer = mixer_of(state_size=24, hidden_size=4)
    with torch.no_grad():
        mixer.theta.zero_()
        mixer.B_im.zero_()
        mixer.C_im.zero_()

    def free(seed):
        torch.rand(3)  # the global generator plays no part
        reducer = MimoSSMReducer(mixer, seed=seed)
        reducer.spectrum()
        return reducer.reduce(4).parameters["C_im"]

    assert torch.equal(free(0), free(0))
    assert not torch.equal(free(0), free(1))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="LRU layers have no method 'modal'"):
        MimoSSMReducer(mixer_of(), "modal")


def test_layers_are_found_by_name_in_order():
    model = tiny_lm(layers=3)
    assert list(find_reducible(model)) == [f"model.layers.{i}.mixer" for i in range(3)]
