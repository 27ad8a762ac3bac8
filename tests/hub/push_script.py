"""Trains, reduces and pushes to the Hub that HF_ENDPOINT names, in all ways; run by `test_push.py`."""

import sys
from pathlib import Path

from tiny import Windows, tiny_lm
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback

output_dir = Path(sys.argv[1]) / "my-ssm"
snapshot = output_dir / "_snapshot"
snapshot.mkdir(parents=True)
(snapshot / "model.safetensors").write_bytes(b"not for others")
args = TrainingArguments(
    str(output_dir),
    max_steps=12,
    save_steps=6,
    eval_steps=1,
    eval_strategy="steps",
    logging_steps=2,
    push_to_hub=True,
    hub_strategy="checkpoint",
    hub_always_push=True,
    hub_token="hf_token",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = Trainer(
    model=tiny_lm(state_size=16),
    args=args,
    train_dataset=Windows(count=64),
    eval_dataset=Windows(count=8),
    callbacks=[CompreSSMCallback(target_state_size=4, end=4, num_reductions=2)],
)
trainer.train()
trainer.push_to_hub(dataset="bytes of plays", license="mit", tasks="text-generation")
trainer.model.push_to_hub("from-model", token="hf_token", tags=["mine"])

# and what others do with it
loaded = AutoModelForCausalLM.from_pretrained("someone/my-ssm")
ids = Windows()[0]["input_ids"][None]
assert loaded(ids).logits.equal(trainer.model.eval()(ids).logits)
print("reloaded from the Hub", type(loaded).__module__)
