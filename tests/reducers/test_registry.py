"""A new architecture is one class and one registration."""

import torch
from torch import nn

from hf_compressm import compress, hankel_singular_values, register_reducer
from hf_compressm.mor import DiagonalBalancing, DiagonalSystem, Spectrum
from hf_compressm.reducers import Reduction, StateReducer
from hf_compressm.surgery import resize_parameter_


class DecayingMemory(nn.Module):
    """``h' = a h + B u, y = C h`` with real decays."""

    def __init__(self, states=12, width=3):
        super().__init__()
        self.a = nn.Parameter(torch.rand(states) * 0.9)
        self.b = nn.Parameter(torch.randn(states, width))
        self.c = nn.Parameter(torch.randn(width, states))


@register_reducer(DecayingMemory)
class DecayingMemoryReducer(StateReducer):
    @property
    def state_size(self):
        return len(self.module.a)

    def spectrum(self):
        m = self.module
        self.balancing = DiagonalBalancing(DiagonalSystem(m.a + 0j, m.b + 0j, m.c + 0j), "complex")
        return Spectrum(self.balancing.hsv, self.state_size)

    def reduce(self, states):
        reduction = self.balancing.reduce(states)
        s = reduction.system
        parameters = {"a": s.lam.real, "b": s.B.real, "c": s.C.real}
        return Reduction(s.order, parameters, [], "balanced", 0.0)

    def resize(self, states):
        m = self.module
        for name, shape in {"a": (states,), "b": (states, 3), "c": (3, states)}.items():
            resize_parameter_(m.get_parameter(name), torch.zeros(shape))


def test_a_registered_layer_is_reduced_wherever_it_stands():
    model = nn.Sequential(nn.Linear(3, 3), DecayingMemory(), nn.Sequential(DecayingMemory(states=8)))
    assert {name: len(v) for name, v in hankel_singular_values(model).items()} == {"1": 12, "2.0": 8}
    report = compress(model, target_state_size=4)
    assert [layer.after for layer in report.events[0].layers] == [4, 4]
    assert model[1].b.shape == (4, 3)
    assert (model[1].a.abs() < 1).all()


def test_a_subclass_of_a_registered_layer_is_reducible():
    class Special(DecayingMemory):
        pass

    assert list(hankel_singular_values(nn.Sequential(Special()))) == ["0"]
