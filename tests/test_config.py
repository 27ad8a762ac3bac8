import pytest
from transformers import HfArgumentParser

from hf_compressm.config import CompressionConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, r"`tolerance` is a fraction in the open interval \(0, 1\); found 0.0"),
        ({"tolerance": 1.0}, "`tolerance` is a fraction"),
        ({"tolerance": -0.1}, "`tolerance` is a fraction"),
        ({"tolerance": float("nan")}, "`tolerance` is a fraction"),
        ({"reduction_fraction": 1.5}, "`reduction_fraction` is a fraction"),
        ({"tolerance": 0.1, "target_state_size": 8}, "found tolerance and target_state_size"),
        ({"target_state_size": 0}, "`target_state_size` is a whole number of at least 1"),
        ({"target_state_size": 2.5}, "`target_state_size` is a whole number"),
        ({"start": 0.3, "end": 0.2}, "ends before it starts: start=0.3, end=0.2"),
        ({"start": 20, "end": 20}, "ends before it starts"),
        ({"start": -1}, "`start` is a step"),
        ({"end": 1.5}, "`end` is a step .* or a fraction"),
        ({"num_reductions": 0}, "`num_reductions` is a whole number"),
        ({"min_reduction": 1.0}, "`min_reduction` is a fraction"),
        ({"reduction_fraction": 0.01}, "nothing would ever be reduced"),
        ({"multiple_of": 0}, "`multiple_of` is a whole number"),
        ({"method": "modal"}, "`method` is one of .*'modal'"),
        ({"moments": "drop"}, "`moments` is one of"),
        ({"budget": "model"}, "`budget` is one of"),
    ],
)
def test_bad_options_are_refused_with_what_was_found(options, message):
    with pytest.raises(ValueError, match=message):
        CompressionConfig(**options)


def test_the_default_rule_is_a_tolerance_of_five_percent():
    assert CompressionConfig().rule == ("tolerance", 0.05)
    assert CompressionConfig(target_state_size=7).rule == ("target_state_size", 7)


@pytest.mark.parametrize(
    ("options", "max_steps", "events"),
    [
        ({}, 1000, [25, 50, 75, 100]),
        ({"start": 0.5, "end": 1.0, "num_reductions": 2}, 1000, [750, 1000]),
        ({"start": 10, "end": 20, "num_reductions": 5}, 1000, [12, 14, 16, 18, 20]),
        ({"start": 10, "end": 0.5, "num_reductions": 1}, 100, [50]),
        ({"end": 1.0, "num_reductions": 1}, 30, [30]),
        ({"end": 1, "num_reductions": 1}, 30, [1]),
        ({"end": 40.0, "num_reductions": 1}, 100, [40]),
        ({}, 4, [1]),  # a very short run still has one event
    ],
)
def test_events(options, max_steps, events):
    assert CompressionConfig(**options).events(max_steps) == events


def test_a_window_that_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match="ends at step 500, but the run has 100 steps"):
        CompressionConfig(end=500).events(100)
    with pytest.raises(ValueError, match="ends before it starts"):
        CompressionConfig(start=50, end=0.1).events(100)


def test_the_command_line_takes_every_option():
    parser = HfArgumentParser(CompressionConfig)
    args = ["--tolerance", "0.02", "--start", "10", "--end", "400", "--moments", "reset", "--uniform", "true"]
    (config,) = parser.parse_args_into_dataclasses(args)
    assert config == CompressionConfig(tolerance=0.02, start=10, end=400, moments="reset", uniform=True)
    assert config.events(1000)[-1] == 400


def test_the_dictionary_makes_the_same_config_again():
    config = CompressionConfig(reduction_fraction=0.2, start=5, end=0.5, budget="global", seed=3)
    assert CompressionConfig(**config.to_dict()) == config
