"""Fine-tune a reduced language model with LoRA: reduce first, then adapt.

    python examples/finetune_lora.py --model outputs/pretrain_clm --train_file speeches.txt

The adapters are saved without their base, which is named in `adapter_config.json` and must be kept at its reduced
size. The end loads both again and merges them into one model. Needs `pip install "hf-compressm[peft]"`.
"""

from dataclasses import dataclass, field

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common import fail, state_sizes
from pretrain_clm import DataArguments, collate, load_sequences

DEFAULTS = {
    "output_dir": "outputs/finetune_lora",
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-3,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
}
# On what LoRA acts: not on the recurrence itself, nor on `out_proj` and `conv1d` of Mamba, which PEFT refuses.
TARGETS = {"mimo_ssm": ["gate"], "mamba": ["in_proj", "x_proj"], "mamba2": ["in_proj"]}


@dataclass
class Arguments:
    """The reduced model and the size of the adapters."""

    model: str = field(default="outputs/pretrain_clm", metadata={"help": "Directory, or name on the Hub."})
    rank: int = field(default=8, metadata={"help": "Rank of the adapters."})


def main(args: list[str] | None = None) -> None:
    """Load, adapt, train, save, reload, merge."""
    parser = HfArgumentParser((Arguments, DataArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    options, data, training = parser.parse_args_into_dataclasses(args)
    set_seed(training.seed)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        train, validation = load_sequences(data, AutoTokenizer.from_pretrained(options.model))
    except (OSError, ValueError) as error:
        fail(error)
    print(f"state sizes {state_sizes(model.config)}, {model.num_parameters():,} parameters")
    targets = TARGETS[model.config.model_type.removeprefix("reducible_")]
    model = get_peft_model(model, LoraConfig(r=options.rank, target_modules=targets, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    trainer = Trainer(model=model, args=training, train_dataset=train, eval_dataset=validation, data_collator=collate)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"validation loss {before:.4f} → {after:.4f} nats per token; adapters saved to {training.output_dir}")

    base = AutoModelForCausalLM.from_pretrained(options.model)
    merged = PeftModel.from_pretrained(base, training.output_dir).merge_and_unload()
    trainer = Trainer(model=merged, args=training, eval_dataset=validation, data_collator=collate)
    print(f"loaded again and merged: {trainer.evaluate()['eval_loss']:.4f} nats per token")


if __name__ == "__main__":
    main()
