"""What a run tells of itself."""

import pytest

from hf_compressm.training.run_record import _command


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train.py", "--seed", "1", "--output_dir", "my runs"], "python train.py --seed 1 --output_dir 'my runs'"),
        (["train.py", "--hub_token", "abc", "--seed", "1"], "python train.py --hub_token '***' --seed 1"),
        (["train.py", "--wandb-api-key=abc", "-x"], "python train.py '--wandb-api-key=***' -x"),
        (["train.py", "hf_" + "a" * 34], "python train.py '***'"),
        (
            ["train.py", "--tokenizer", "bpe", "--token", "--seed", "1"],
            "python train.py --tokenizer bpe --token --seed 1",
        ),
    ],
)
def test_secrets_of_a_command_line_are_not_published(words, shown):
    assert _command(words) == shown
