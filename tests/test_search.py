"""The largest reduction that the loss tolerates."""

import copy
import math

import pytest
import torch
from tiny import Windows, batch, state_sizes, tiny_lm, train
from torch.utils.data import DataLoader

from hf_compressm import compress
from hf_compressm.search import largest_reduction


def test_the_search_finds_the_edge_of_a_known_curve():
    def sizes_for(error):
        return {"a": round(100 * (1 - error)), "b": 10}

    sizes, increase = largest_reduction(sizes_for, lambda sizes: (100 - sizes["a"]) / 100, 0.3)
    assert increase <= 0.3
    assert 70 <= sizes["a"] <= 72


def test_a_loss_that_is_not_finite_is_never_tolerated():
    assert largest_reduction(lambda error: {"a": 1}, lambda sizes: math.nan, 1e9) == ({}, 0.0)


@pytest.fixture(scope="module")
def trained():
    model = tiny_lm(state_size=64, hidden_size=32, r_min=0.3, r_max=0.98)
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), steps=60, size=32)
    return model


def loss_on(model, rows):
    model.eval()
    with torch.no_grad():
        return model(input_ids=rows, labels=rows).loss.item()


@pytest.mark.parametrize("limit", [0.003, 0.01, 0.03, 0.1, 0.3])
def test_the_increase_holds_on_unseen_data_and_the_limit_is_used(trained, limit):
    model = copy.deepcopy(trained)
    unseen = torch.stack([Windows(count=400)[i]["input_ids"] for i in range(200, 400)])
    before = loss_on(model, unseen)
    calibration = DataLoader(Windows(count=128), batch_size=32)
    report = compress(model, max_loss_increase=limit, dataloader=calibration, calibration_batches=4)
    assert max(state_sizes(model)) < 64
    increase = loss_on(model, unseen) - before
    assert increase <= 1.5 * limit
    assert [layer.after for layer in report.events[0].layers] == state_sizes(model)
    half = copy.deepcopy(model)
    compress(half, reduction_fraction=0.75)
    assert loss_on(half, unseen) - before > limit  # much smaller would have cost more than was allowed


def test_the_search_leaves_no_trace_when_nothing_is_tolerated(trained):
    model = copy.deepcopy(trained).train()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, random_state = model.config.to_dict(), torch.get_rng_state()
    params = [id(p) for p in model.parameters()]
    compress(model, max_loss_increase=1e-12, dataloader=[batch()], min_reduction=0.5, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert [id(p) for p in model.parameters()] == params
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("dataloader", "message"),
    [
        (None, "max_loss_increase measures the loss: pass `dataloader`"),
        ([], "found no batch"),
        ([torch.zeros(2, 2)], "found Tensor"),
        ([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], "Expected the model to return a loss"),
    ],
)
def test_calibration_data_that_does_not_do_is_refused(trained, dataloader, message):
    model = copy.deepcopy(trained)
    with pytest.raises(ValueError, match=message):
        compress(model, max_loss_increase=0.1, dataloader=dataloader)
    assert state_sizes(model) == [64, 64]
