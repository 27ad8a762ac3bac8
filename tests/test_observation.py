"""What the hooks see, and what they do not."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_compressm import compress, hankel_singular_values
from hf_compressm.mor import Spectrum
from hf_compressm.observation import Observation
from hf_compressm.reducers import StateReducer, register_reducer


class Gated(nn.Module):
    """Stands for a layer whose Gramian depends on the input: that of its weight times the inputs' covariance."""

    def __init__(self, states=6, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(states, width))

    def forward(self, x):
        return x @ self.weight.T @ self.weight


@register_reducer(Gated)
class GatedReducer(StateReducer):
    needs_observation = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.total = torch.zeros(4, 4, dtype=torch.float64)

    @property
    def state_size(self):
        return len(self.module.weight)

    def observe(self, args, kwargs):
        rows = args[0].reshape(-1, 4).double()
        self.total += rows.T @ rows

    def statistics(self):
        return {"total": self.total}

    def load_statistics(self, *processes):
        self.total = sum(statistics["total"] for statistics in processes)

    def reduce_over_ranks(self, ranks):
        self.total = sum(ranks.gather(self.total))

    def spectrum(self):
        if not self.total.any():
            raise ArithmeticError("nothing was observed")
        weight = self.module.weight.double()
        return Spectrum(torch.linalg.eigvalsh(weight @ self.total @ weight.T).flip(0).clamp_min(0), self.state_size)

    def reduce(self, states):
        raise ArithmeticError("not needed here")

    def resize(self, states):
        raise AssertionError("not needed here")


def observed(run, model, training_only=True):
    reducer = GatedReducer(model)
    observation = Observation({"": reducer}, training_only)
    observation.start()
    run()
    observation.stop()
    return reducer.total


def test_activation_checkpointing_does_not_count_twice():
    model, x = Gated(), torch.randn(5, 4, requires_grad=True)
    expected = x.detach().double().T @ x.detach().double()
    for reentrant in (False, True):
        found = observed(lambda r=reentrant: checkpoint(model, x, use_reentrant=r).sum().backward(), model)
        torch.testing.assert_close(found, expected)


def test_evaluation_between_training_steps_is_not_seen():
    model, x = Gated(), torch.randn(5, 4)
    assert not observed(lambda: model.eval()(x), model).any()
    assert observed(lambda: model.eval()(x), model, training_only=False).any()


def test_nothing_is_seen_before_the_start_or_after_the_stop():
    model, x = Gated(), torch.randn(5, 4)
    observation = Observation({"": GatedReducer(model)}, training_only=True)
    model(x)
    observation.start()
    observation.stop()
    model(x)
    assert not observation.statistics()["/total"].any()


def test_compiled_code_is_observed_as_well():
    model, x = Gated(), torch.randn(5, 4)
    compiled = torch.compile(model, backend="eager")
    before = compiled(x)
    total = observed(lambda: compiled(x), model)
    torch.testing.assert_close(total, x.double().T @ x.double())
    torch.testing.assert_close(compiled(x), before)


def test_statistics_go_through_a_checkpoint():
    model, x = Gated(), torch.randn(5, 4)
    first, second = (Observation({"a.b": GatedReducer(model)}, True) for _ in range(2))
    first.start()
    model(x)
    first.stop()
    second.load_statistics(first.statistics())
    assert torch.equal(second.statistics()["a.b/total"], x.double().T @ x.double())
    second.load_statistics(first.statistics(), first.statistics())
    assert torch.equal(second.statistics()["a.b/total"], 2 * x.double().T @ x.double())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Gated()

    def forward(self, x):
        return self.layer(x)


def test_a_data_loader_calibrates_outside_training():
    model, batches = Model().train(), [{"x": torch.randn(5, 4)} for _ in range(6)]
    rows = torch.cat([batch["x"] for batch in batches[:4]]).double()  # calibration_batches
    weight = model.layer.weight.double()
    expected = torch.linalg.eigvalsh(weight @ rows.T @ rows @ weight.T).flip(0).clamp_min(0)
    torch.testing.assert_close(hankel_singular_values(model, batches)["layer"], expected.detach())
    assert model.training
    with pytest.raises(ValueError, match="depend on its input: pass `dataloader`"):
        compress(model)
