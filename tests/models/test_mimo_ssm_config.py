import copy
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig

from hf_compressm.models import MimoSSMConfig, layer_state_sizes, set_layer_state_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": None}, "`vocab_size` .* `input_size` .* found neither"),
        ({"vocab_size": 0}, "vocab_size to be an integer of at least 1, found 0"),
        ({"input_size": 0}, "input_size to be an integer of at least 1, found 0"),
        ({"hidden_size": -4}, "hidden_size to be an integer of at least 1, found -4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers to be an integer of at least 1, found 0"),
        ({"state_size": 0}, "state_size of layer 0 to be an integer of at least 1, found 0"),
        ({"state_size": "8"}, "'state_size' expected int, got str"),
        ({"r_min": -0.1}, "0 <= r_min < r_max <= 1, found r_min=-0.1"),
        ({"r_min": 0.9, "r_max": 0.9}, "found r_min=0.9, r_max=0.9"),
        ({"r_max": 1.1}, "r_max=1.1"),
        ({"max_phase": 7.0}, "0 <= max_phase <= 2 pi, found 7.0"),
        ({"hidden_dropout": 1.0}, "0 <= hidden_dropout < 1, found 1.0"),
        ({"pooling": "max"}, "'pooling' expected one of"),
        ({"per_layer_config": {3: {"state_size": 4}}}, r"range \[0, 3\); got \[3\]"),
        ({"per_layer_config": {-1: {"state_size": 4}}}, r"range \[0, 3\); got \[-1\]"),
        (
            {"per_layer_config": {1: {"state_size": 0}}},
            "state_size of layer 1 to be an integer of at least 1, found 0",
        ),
        ({"per_layer_config": {1: {"state_size": True}}}, "state_size"),
        ({"per_layer_config": {1: {"state_size": 4.5}}}, "'state_size' expected int, got float"),
        ({"per_layer_config": {1: {"hidden_size": 4}}}, r"nothing but `state_size`, found \['hidden_size'\]"),
        ({"per_layer_config": {1: {"skip": ["mixer"]}}}, r"nothing but `state_size`, found \['skip'\]"),
        ({"per_layer_config": {1: {"stat_size": 4}}}, "stat_size"),
    ],
)
def test_bad_values_are_refused(make_config, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make_config(**options)


def test_a_config_made_invalid_later_is_not_saved(make_config, tmp_path):
    config = make_config()
    config.r_min = 1.0
    with pytest.raises(StrictDataclassError, match="r_min"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("reload", ["save_pretrained", "from_dict", "deepcopy"])
@pytest.mark.parametrize("per_layer", [None, {1: {"state_size": 4}}, {i: {"state_size": 11 - i} for i in range(11)}])
def test_round_trip(make_config, tmp_path, reload, per_layer):
    config = make_config(num_hidden_layers=11, per_layer_config=per_layer, input_size=3, pooling="last")
    if reload == "save_pretrained":
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
    elif reload == "from_dict":
        again = MimoSSMConfig.from_dict(json.loads(config.to_json_string()))
    else:
        again = copy.deepcopy(config)
    assert type(again) is MimoSSMConfig
    assert again.to_json_string() == config.to_json_string()
    assert layer_state_sizes(again) == layer_state_sizes(config)
    assert repr(again) == repr(config)


def test_generation_config_comes_from_a_config_with_unequal_sizes(make_config):
    config = make_config(per_layer_config={1: {"state_size": 4}})
    assert GenerationConfig.from_model_config(config).eos_token_id == 2


def test_setting_layer_sizes(make_config):
    config = make_config()
    set_layer_state_size(config, 1, 4)
    assert layer_state_sizes(config) == [8, 4, 8]
    assert json.loads(config.to_json_string())["per_layer_config"] == {"1": {"state_size": 4}}
    set_layer_state_size(config, 0, 4)
    set_layer_state_size(config, 2, 4)
    assert "per_layer_config" not in config.to_json_string()
    assert config.state_size == 4
    set_layer_state_size(config, 2, 9)
    assert layer_state_sizes(config) == [4, 4, 9]
    written = json.loads(config.to_json_string())
    assert written["state_size"] == 9
    assert written["per_layer_config"] == {"0": {"state_size": 4}, "1": {"state_size": 4}}


def test_the_normal_form_does_not_depend_on_the_way(make_config):
    one, other = make_config(), make_config(state_size=100)
    for idx in (0, 1, 2):
        set_layer_state_size(one, idx, idx + 2)
    for idx in (2, 0, 1):
        set_layer_state_size(other, idx, idx + 2)
    assert one.to_json_string() == other.to_json_string()


@pytest.mark.parametrize(("idx", "n", "error"), [(3, 4, IndexError), (-1, 4, IndexError), (0, 0, ValueError)])
def test_setting_an_impossible_size_changes_nothing(make_config, idx, n, error):
    config = make_config()
    before = config.to_json_string()
    with pytest.raises(error, match="expected"):
        set_layer_state_size(config, idx, n)
    assert config.to_json_string() == before


def test_one_layer_has_a_plain_size(make_config):
    config = make_config(num_hidden_layers=1)
    set_layer_state_size(config, 0, 3)
    assert config.state_size == 3
    assert not config.is_heterogeneous
