"""A real run to make cards of."""

import pytest
from tiny import Windows, tiny_lm
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The output directory of a run with two reductions, saved as the examples save theirs."""
    output_dir = tmp_path_factory.mktemp("runs") / "tiny-ssm"
    args = TrainingArguments(
        str(output_dir),
        max_steps=10,
        eval_steps=1,
        eval_strategy="steps",
        logging_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    callback = CompreSSMCallback(target_state_size=4, start=2, end=6, num_reductions=2)
    data = {"train_dataset": Windows(count=64), "eval_dataset": Windows(count=8)}
    trainer = Trainer(model=tiny_lm(state_size=16), args=args, callbacks=[callback], **data)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return output_dir
