"""Optimizer state under a change of basis, against the state that the new coordinates would have collected."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from hf_compressm.surgery import (
    GradientMap,
    carry_state,
    check_optimizer,
    drop_stale_state,
    reset_state,
    resize_parameter_,
)

OLD, NEW, WIDTH = 6, 3, 5

LINEAR = {  # optimizer, key of a state that is linear in the gradient
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), "exp_avg"),
    "adamw-fused": (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), "exp_avg"),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True), "grad_avg"),
    "muon": (lambda p: torch.optim.Muon(p, lr=0.1), "momentum_buffer"),
}
SQUARED = {  # optimizer, keys of states that are linear in the squared gradient
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1), ["exp_avg_sq"]),
    "amsgrad": (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), ["exp_avg_sq", "max_exp_avg_sq"]),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), ["square_avg"]),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), ["sum"]),
    "adafactor-torch": (lambda p: torch.optim.Adafactor(p, lr=0.1), ["row_var", "col_var"]),
    "adafactor-transformers": (
        lambda p: TransformersAdafactor(p, lr=0.1, relative_step=False),
        ["exp_avg_sq_row", "exp_avg_sq_col"],
    ),
}
EVERY = {**{k: v[0] for k, v in LINEAR.items()}, **{k: v[0] for k, v in SQUARED.items()}}


def make_group(states, dim):
    shape = (states, WIDTH) if dim == 0 else (WIDTH, states)
    return {"re": nn.Parameter(torch.randn(shape)), "im": nn.Parameter(torch.randn(shape))}


def feed(optimizer, params, gradients):
    for gradient in gradients:
        for param, g in zip(params.values(), gradient, strict=True):
            param.grad = g.clone(memory_format=torch.contiguous_format)  # the fused CPU kernels assume it
        optimizer.step()
        optimizer.zero_grad()


def states_of(optimizer, params, key):
    return [optimizer.state[p][key] for p in params.values()]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_state_is_what_the_new_coordinates_would_have_collected(name, dim):
    make, key = LINEAR[name]
    params, reduced = make_group(OLD, dim), make_group(NEW, dim)
    gradient_map = GradientMap(("re", "im"), dim, torch.randn(2 * NEW, 2 * OLD, dtype=torch.float64))
    gradients = [[torch.randn_like(p) for p in params.values()] for _ in range(4)]
    optimizer, expected = make(list(params.values())), make(list(reduced.values()))
    feed(optimizer, params, gradients)
    feed(expected, reduced, [[g.float() for g in gradient_map.apply(pair)] for pair in gradients])
    carry_state(optimizer, params, [gradient_map])
    for found, wanted in zip(states_of(optimizer, params, key), states_of(expected, reduced, key), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SQUARED)
def test_squared_state_is_exact_for_a_scaled_selection(name, dim):
    """Every new gradient is a multiple of one old gradient: then nothing is lost by squaring the map. Gradients whose
    squares have rank one keep the factored estimate of Adafactor exact as well."""
    make, keys = SQUARED[name]
    params, reduced = make_group(OLD, dim), make_group(NEW, dim)
    matrix = torch.zeros(2 * NEW, 2 * OLD, dtype=torch.float64)
    matrix[torch.arange(2 * NEW), torch.tensor([1, 3, 4, 7, 9, 10])] = torch.rand(2 * NEW, dtype=torch.float64) + 0.5
    gradient_map = GradientMap(("re", "im"), dim, matrix)
    base = [torch.randn(OLD, 1) @ torch.randn(1, WIDTH) for _ in range(2)]
    base = base if dim == 0 else [b.T for b in base]
    gradients = [[b * (k + 1) for b in base] for k in range(3)]
    optimizer, expected = make(list(params.values())), make(list(reduced.values()))
    feed(optimizer, params, gradients)
    feed(expected, reduced, [[g.float() for g in gradient_map.apply(pair)] for pair in gradients])
    carry_state(optimizer, params, [gradient_map])
    for key in keys:
        for found, wanted in zip(states_of(optimizer, params, key), states_of(expected, reduced, key), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_second_moments_of_a_constant_gradient_are_exact_for_any_map():
    params, reduced = make_group(OLD, 0), make_group(NEW, 0)
    gradient_map = GradientMap(("re", "im"), 0, torch.randn(2 * NEW, 2 * OLD, dtype=torch.float64))
    gradient = [torch.randn_like(p) for p in params.values()]
    optimizer = torch.optim.AdamW(params.values())
    expected = torch.optim.AdamW(reduced.values())
    feed(optimizer, params, [gradient] * 5)
    feed(expected, reduced, [[g.float() for g in gradient_map.apply(gradient)]] * 5)
    carry_state(optimizer, params, [gradient_map])
    for found, wanted in zip(
        states_of(optimizer, params, "exp_avg_sq"), states_of(expected, reduced, "exp_avg_sq"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_a_map_for_each_group_is_that_of_each_group_alone():
    matrix = torch.randn(3, NEW, OLD, dtype=torch.float64)
    matrix[1, 2] = 0  # a direction without a gradient so far
    whole = nn.Parameter(torch.randn(3, OLD, WIDTH))
    parts = [nn.Parameter(part.detach().clone()) for part in whole]
    gradients = torch.randn(3, *whole.shape)
    optimizer, apart = torch.optim.AdamW([whole]), torch.optim.AdamW(parts)
    for gradient in gradients:
        feed(optimizer, {"whole": whole}, [[gradient]])
        feed(apart, dict(enumerate(parts)), [list(gradient)])
    carry_state(optimizer, {"whole": whole}, [GradientMap(("whole",), 1, matrix)])
    carry_state(apart, dict(enumerate(parts)), [GradientMap((i,), 0, matrix[i]) for i in range(3)])
    for key in ("exp_avg", "exp_avg_sq"):
        found, expected = optimizer.state[whole][key], torch.stack([apart.state[part][key] for part in parts])
        silent = (matrix == 0).all(dim=2)
        torch.testing.assert_close(found[~silent], expected[~silent])
    torch.testing.assert_close(found[silent], found[~silent].mean(dim=0, keepdim=True))


@pytest.mark.parametrize("moments", ["carry", "reset"])
@pytest.mark.parametrize("name", EVERY)
def test_training_goes_on_after_the_shapes_changed(name, moments):
    params = make_group(OLD, 0)
    params["unmapped"] = nn.Parameter(torch.randn(OLD, 2))
    other = nn.Parameter(torch.randn(4, 4))
    optimizer = EVERY[name]([*params.values(), other])
    everything = {**params, "other": other}
    feed(optimizer, everything, [[torch.randn_like(p) for p in everything.values()] for _ in range(3)])
    kept = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[other].items()}
    if moments == "carry":
        maps = [GradientMap(("re", "im"), 0, torch.randn(2 * NEW, 2 * OLD, dtype=torch.float64))]
        carry_state(optimizer, params, maps)
    else:
        reset_state(optimizer, list(params.values()))
    for param in params.values():
        resize_parameter_(param, torch.randn(NEW, param.shape[1]))
    assert drop_stale_state(optimizer) == 0
    for key, value in kept.items():
        assert (optimizer.state[other][key] == value) if not torch.is_tensor(value) else True
        if torch.is_tensor(value):
            assert torch.equal(optimizer.state[other][key], value)
    before = [p.detach().clone() for p in everything.values()]
    feed(optimizer, everything, [[torch.randn_like(p) for p in everything.values()] for _ in range(2)])
    for old, param in zip(before, everything.values(), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(old, param)
    for param in params.values():
        sizes = {tuple(t.shape) for t in optimizer.state[param].values() if torch.is_tensor(t) and t.numel() > 1}
        assert all(OLD not in size for size in sizes)


def test_directions_without_a_gradient_so_far_do_not_get_a_vanishing_second_moment():
    params = make_group(OLD, 0)
    matrix = torch.randn(2 * NEW, 2 * OLD, dtype=torch.float64)
    matrix[NEW] = 0
    optimizer = torch.optim.AdamW(params.values())
    feed(optimizer, params, [[torch.randn_like(p) for p in params.values()] for _ in range(3)])
    carry_state(optimizer, params, [GradientMap(("re", "im"), 0, matrix)])
    real, imaginary = states_of(optimizer, params, "exp_avg_sq")
    mean = torch.cat([real, imaginary[1:]]).mean(dim=0)
    torch.testing.assert_close(imaginary[0], mean)


def test_optimizers_without_a_known_map_are_refused_unless_reset():
    params = [nn.Parameter(torch.zeros(2, 2))]
    nadam = torch.optim.NAdam(params)
    with pytest.raises(ValueError, match=r'NAdam cannot be carried.*moments="reset"'):
        check_optimizer(nadam, "carry")
    check_optimizer(nadam, "reset")
    for moments in ("carry", "reset"):
        with pytest.raises(ValueError, match="LBFGS keeps its state elsewhere"):
            check_optimizer(torch.optim.LBFGS(params), moments)


def test_a_subclass_may_hold_more_state_and_is_refused():
    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(ValueError, match="Mine cannot be carried"):
        check_optimizer(Mine([nn.Parameter(torch.zeros(2))]), "carry")


def test_the_wrapper_of_accelerate_is_looked_through():
    params = make_group(OLD, 0)
    inner = torch.optim.AdamW(params.values())
    wrapped = Accelerator(cpu=True).prepare(inner)
    check_optimizer(wrapped, "carry")
    feed(inner, params, [[torch.randn_like(p) for p in params.values()]])
    reset_state(wrapped, list(params.values()))
    assert not inner.state


def test_stale_state_is_found_and_dropped():
    params = make_group(OLD, 0)
    for make in EVERY.values():
        optimizer = make(list(params.values()))
        feed(optimizer, params, [[torch.randn_like(p) for p in params.values()]])
        assert drop_stale_state(optimizer) == 0
        resize_parameter_(params["re"], torch.randn(NEW, WIDTH))
        assert drop_stale_state(optimizer) == 1
        assert params["re"] not in optimizer.state
        resize_parameter_(params["re"], torch.randn(OLD, WIDTH))


class Projected(torch.optim.Optimizer):
    """Keeps a state of another shape than its parameter, as optimizers that quantize or project do."""

    def step(self):
        for param in self.param_groups[0]["params"]:
            self.state[param]["projection"] = param.grad.flatten()[:3]


def test_state_with_shapes_of_its_own_is_stale_only_where_the_shape_has_changed():
    params = make_group(OLD, 0)
    optimizer = Projected(params.values(), {})
    feed(optimizer, params, [[torch.randn_like(p) for p in params.values()]])
    assert drop_stale_state(optimizer) == 0
    resize_parameter_(params["re"], torch.randn(NEW, WIDTH))
    assert drop_stale_state(optimizer, [params["re"]]) == 1
    assert list(optimizer.state) == [params["im"]]
