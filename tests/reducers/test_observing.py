"""What both selective architectures keep of the forward passes they see."""

import pytest
import torch
from reducers import test_mamba, test_mamba2

from hf_compressm.reducers import find_reducible, mamba, mamba2, observing

FAMILIES = {"mamba": (test_mamba, mamba, "mamba_signals"), "mamba2": (test_mamba2, mamba2, "mamba2_layer")}
EACH = pytest.mark.parametrize("family", FAMILIES)


def observed(mixer, *batches):
    [(_, cls)] = find_reducible(mixer).values()
    reducer = cls(mixer)
    for hidden, kwargs in batches:
        reducer.observe((hidden,), kwargs)
    return reducer


def sums_of(reducer):
    """All sums that do not depend on random signs."""
    found = reducer.statistics().items()
    return {key: value for key, value in found if key.startswith("sum.") and (key != "sum.Q" or len(value.shape) == 3)}


@EACH
def test_long_sequences_are_recomputed_in_spans_of_time(family, monkeypatch):
    """The same sums, and never more than a bounded number of tokens at once."""
    tests, module, recompute = FAMILIES[family]
    mixer = tests.mixer_of()
    hidden = tests.hidden_of(5, 50)
    mask = torch.ones(5, 50, dtype=torch.bool)
    mask[0, :13] = mask[2, 30:] = False
    whole = sums_of(observed(mixer, (hidden, {"attention_mask": mask})))
    calls = []
    original = getattr(module, recompute)

    def recording(mixer, hidden, *args, **options):
        calls.append(hidden.shape[0] * (hidden.shape[1] - options["context"]))
        return original(mixer, hidden, *args, **options)

    monkeypatch.setattr(module, recompute, recording)
    for tokens in (7, 64):
        calls.clear()
        monkeypatch.setattr(observing, "_PASS_ELEMENTS", tokens * mixer.intermediate_size)
        found = sums_of(observed(mixer, (hidden, {"attention_mask": mask})))
        assert max(calls) <= tokens < sum(calls)
        assert found.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], msg=name)


@EACH
def test_sequences_held_out_enter_no_sum(family):
    """The candidates of a reduction are compared on sequences that neither their Gramians nor their fits have seen."""
    tests, _, _ = FAMILIES[family]
    mixer = tests.mixer_of()
    first, second = tests.hidden_of(4, 30), tests.hidden_of(3, 30, seed=2)
    reducer = observed(mixer, (first, {}), (second, {}))
    _, (held_out, real, _) = reducer._fit_and_held_out()
    assert torch.equal(held_out[real], torch.cat([first[1], first[3], second[1]]))
    changed = [batch.clone() for batch in (first, second)]
    for batch in changed:
        batch[1::2] *= 7
    again = sums_of(observed(mixer, *((batch, {}) for batch in changed)))
    for name, value in sums_of(reducer).items():
        assert torch.equal(value, again[name]), name


@EACH
def test_ranks_with_different_numbers_of_sequences_lose_none(family):
    tests, _, _ = FAMILIES[family]
    mixer = tests.mixer_of()
    [(_, cls)] = find_reducible(mixer).values()
    found = []
    for rank, counts in enumerate([(3, 2), (5, 4)]):
        reducer = cls(mixer)
        reducer.rank, reducer.ranks = rank, 2
        for i, count in enumerate(counts):
            reducer.observe((tests.hidden_of(count, 20, seed=10 * rank + i),), {})
        found.append(reducer.statistics())
    held_out = [[t for name, t in s.items() if name.startswith("sample.") and int(name[7:]) % 2] for s in found]
    merged = observing._merged(found)
    samples = {int(name[7:]): t for name, t in merged.items() if name.startswith("sample.")}
    assert len(samples) == 3 + 2 + 5 + 4
    assert sum(number % 2 for number in samples) == sum(map(len, held_out))
    for sample in [*held_out[0], *held_out[1]]:
        assert any(number % 2 and torch.equal(sample, other) for number, other in samples.items())
