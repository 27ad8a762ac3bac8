import copy
import pickle

import pytest
import torch
from ops.scans import assert_same
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hf_compressm import ReducibleMambaConfig, ReducibleMambaForCausalLM, compress, fast_scans, use_fast_scans

SIZES = {"vocab_size": 11, "hidden_size": 16, "state_size": 6, "num_hidden_layers": 2}


@pytest.fixture(params=["mamba", "mamba2"])
def model(request):
    if request.param == "mamba":
        model = MambaForCausalLM(MambaConfig(**SIZES, use_bias=True))
    else:
        sizes = {"head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**SIZES, **sizes, use_bias=True))
    for parameter in model.parameters():  # zero biases would hide what padding does
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_tokens():
    return torch.randint(11, (3, 21))


def make_mask(side):
    padding = torch.tensor([0, 4, 20])[:, None]
    steps = torch.arange(21)
    return (steps >= padding if side == "left" else steps < 21 - padding).long()


def mixer_types(model):
    return {type(module) for module in model.modules() if isinstance(module, (MambaMixer, Mamba2Mixer))}


def loss_and_gradients(model, tokens, **options):
    out = model(tokens, labels=tokens, **options)
    return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_equals_the_stock_model(model, side):
    tokens, mask = make_tokens(), None if side is None else make_mask(side)
    stock = loss_and_gradients(model, tokens, attention_mask=mask)
    use_fast_scans(model)
    assert_same(loss_and_gradients(model, tokens, attention_mask=mask), stock, 1e-5)


def test_runs_the_scans_of_this_package(model, monkeypatch):
    calls = []
    for name in ("mamba_scan", "mamba2_scan"):
        scan = getattr(fast_scans, name)
        monkeypatch.setattr(fast_scans, name, lambda *a, scan=scan, **kw: calls.append(a) or scan(*a, **kw))
    use_fast_scans(model)
    model(make_tokens())
    assert len(calls) == 2


def test_generates_the_same_tokens_from_the_same_states(model):
    tokens, mask = make_tokens()[:, :9], make_mask("left")[:, -9:]
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(tokens, attention_mask=mask, **options)
    use_fast_scans(model)
    fast = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(fast.sequences, stock.sequences)
    assert_same(fast.logits, stock.logits, 1e-5)


def test_goes_on_from_a_cache_as_the_stock_model_does(model):
    tokens = make_tokens()

    def in_pieces():
        cache, outputs = None, []
        for piece in tokens.split([5, 1, 8, 7], dim=1):
            out = model(piece, cache=cache, use_cache=True)
            cache = out.cache
            outputs.append(out.logits)
        return outputs

    with torch.no_grad():
        stock = in_pieces()
        use_fast_scans(model)
        assert_same(in_pieces(), stock, 1e-5)


def test_touches_that_model_only_and_can_be_undone(model):
    other = copy.deepcopy(model)
    (stock,) = mixer_types(model)
    handle = use_fast_scans(model)
    (fast,) = mixer_types(model)
    assert fast is not stock
    assert issubclass(fast, stock)
    assert mixer_types(other) == {stock}
    with use_fast_scans(model):
        assert mixer_types(model) == {fast}
    assert mixer_types(model) == {fast}  # the block found it fast
    handle.remove()
    handle.remove()
    assert mixer_types(model) == {stock}
    with use_fast_scans(model):
        assert mixer_types(model) == {fast}
    assert mixer_types(model) == {stock}


def test_copies_and_pickles_are_as_fast(model):
    tokens = make_tokens()
    (stock,) = mixer_types(model)
    use_fast_scans(model)
    expected = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mixer_types(twin) == mixer_types(model)
        assert torch.equal(twin(tokens).logits, expected)
        use_fast_scans(twin, enabled=False)
        assert mixer_types(twin) == {stock}
    assert mixer_types(model) != {stock}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in the stock scan
def test_compiles_in_one_graph_and_notices_the_change(model):
    tokens = make_tokens()
    compiled = torch.compile(model, backend="aot_eager")
    stock = loss_and_gradients(compiled, tokens)
    use_fast_scans(model)
    torch._dynamo.utils.counters.clear()
    fast = loss_and_gradients(compiled, tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # it was compiled anew
    assert_same(fast, stock, 1e-5)


def test_the_checkpoint_is_the_stock_one(model, tmp_path):
    model.save_pretrained(tmp_path / "stock")
    use_fast_scans(model)
    model.save_pretrained(tmp_path / "fast")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fast").iterdir())
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()


def test_reductions_find_the_mixers(model):
    tokens = make_tokens()
    use_fast_scans(model)
    batches = [{"input_ids": tokens, "labels": tokens}]
    report = compress(model, dataloader=batches, target_state_size=3)
    assert [layer.after for layer in report.events[-1].layers] == [3, 3]
    reduced = model(tokens).logits
    use_fast_scans(model, enabled=False)
    assert_same([reduced], [model(tokens).logits], 1e-5)


def test_elsewhere_the_stock_forward_runs(model, monkeypatch):
    use_fast_scans(model)
    (fast,) = mixer_types(model)
    calls = []
    monkeypatch.setattr(fast.__mro__[2], "forward", lambda self, hidden, **_: calls.append(self) or hidden)
    model.to("meta")(make_tokens().to("meta"))
    assert len(calls) == 2


def test_models_of_this_package_need_no_change():
    model = ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES))
    before = mixer_types(model)
    use_fast_scans(model).remove()
    assert mixer_types(model) == before


def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match="found none in Linear"):
        use_fast_scans(torch.nn.Linear(2, 2))
    mixer = next(module for module in model.modules() if isinstance(module, (MambaMixer, Mamba2Mixer)))
    mixer.forward = mixer.forward
    with pytest.raises(ValueError, match="call use_fast_scans before"):
        use_fast_scans(model)
