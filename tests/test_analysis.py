import copy
import json

import pytest
import torch
from tiny import batch, tiny_lm
from torch import nn

from hf_compressm import CompressionConfig, ReducibleMambaConfig, ReducibleMambaForCausalLM, analyze, compress
from hf_compressm.analysis import _saved_bytes, _step_costs


@pytest.fixture(scope="module")
def mamba():
    torch.manual_seed(0)
    return ReducibleMambaForCausalLM(
        ReducibleMambaConfig(vocab_size=256, hidden_size=16, state_size=8, num_hidden_layers=2)
    )


def sizes(event):
    return [layer.after for layer in event.layers]


def test_every_candidate_is_what_compress_would_do(mamba):
    data = [batch(4, 32), batch(8, 32)]
    found = analyze(mamba, data, tolerances=[0.3, 0.05])
    assert [candidate.rule for candidate in found.candidates] == ["τ=0.05", "τ=0.3"]
    for tolerance, candidate in zip([0.05, 0.3], found.candidates, strict=True):
        reduced = copy.deepcopy(mamba)
        event = compress(reduced, tolerance=tolerance, dataloader=data).events[0]
        assert sizes(candidate.event) == sizes(event)
        assert [x.relative_error for x in candidate.event.layers] == [x.relative_error for x in event.layers]
        assert candidate.step.parameters == reduced.num_parameters()


def test_the_model_and_the_random_numbers_stay_as_they_are(mamba):
    mamba.train()
    weights, state = copy.deepcopy(mamba.state_dict()), torch.get_rng_state()
    analyze(mamba, [batch(2, 16)], tolerances=[0.2], max_loss_increase=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in mamba.state_dict().items())
    assert mamba.training
    assert all(p.grad is None for p in mamba.parameters())


def test_another_rule_is_one_more_candidate():
    model = tiny_lm(state_size=16, layers=1)
    found = analyze(model, tolerances=[0.1], config=CompressionConfig(target_state_size=4))
    assert [candidate.rule for candidate in found.candidates] == ["τ=0.1", "target_state_size=4"]
    assert sizes(found.candidates[1].event) == [4]


def test_without_a_batch_nothing_is_timed_and_the_table_says_so():
    found = analyze(tiny_lm(state_size=16, layers=1), tolerances=[0.1])
    assert found.step.seconds is None
    assert "Without a batch" in str(found)
    assert "training step, ms" not in str(found)


def test_the_table_has_sizes_bounds_and_gains():
    found = analyze(tiny_lm(state_size=16), [batch(2, 16)], tolerances=[0.01, 0.3])
    rows = {line.split("  ")[0]: line.split() for line in reversed(str(found).splitlines()) if line}
    layer = found.candidates[1].event.layers[0]
    assert rows["model.layers.0.mixer"][1:] == ["16", *(str(c.event.layers[0].after) for c in found.candidates)]
    assert f"{layer.error_bound:.3g}" in str(found)
    assert rows["training step, ms"][3:] == [
        f"{1e3 * step.seconds:.1f}" for step in (found.step, *(c.step for c in found.candidates))
    ]
    assert json.loads(json.dumps(found.to_dict()))["candidates"][1]["event"]["layers"][0]["after"] == layer.after


def test_memory_is_what_autograd_keeps_and_what_the_parameters_need():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 5))

        def forward(self, x):
            return type("Output", (), {"loss": (x @ self.weight).square().sum()})

    x = torch.ones(7, 3)
    # x for the gradient of the weight, and the product for that of the square; the weight itself is a parameter
    assert _saved_bytes(Square(), {"x": x}) == 4 * (7 * 3 + 7 * 5)
    found = analyze(tiny_lm(state_size=16, layers=1), [batch(2, 16)], tolerances=[0.1])
    assert found.step.memory_bytes == found.step.activation_bytes + 16 * found.step.parameters


def test_steps_that_cannot_be_measured_take_nothing_else_away(caplog, monkeypatch):
    """As where the memory is enough for the first copies alone."""
    model, measured = tiny_lm(state_size=16, layers=1), []

    def measure(models, data):
        measured.append(len(measured))
        if len(measured) == 2:
            raise RuntimeError("CUDA out of memory.")
        return _step_costs(models, data)

    monkeypatch.setattr("hf_compressm.analysis._step_costs", measure)
    found = analyze(model, [batch(2, 16)], tolerances=[0.05, 0.1, 0.3])
    without = analyze(model, tolerances=[0.05, 0.1, 0.3])
    assert measured == [0, 1]
    assert "No training step could be measured: RuntimeError: CUDA out of memory." in caplog.text
    assert str(found) == str(without)
