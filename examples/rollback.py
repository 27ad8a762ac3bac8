"""Let the validation loss judge every reduction: one that costs too much is taken back.

Without arguments: a small language model that loses half of its states at each of six reductions, until one of them
raises the validation loss by more than 2 %. Model and optimizer are then put back to what they were before it, and the
run goes on at the size that was still good enough ("pragmatic" variant of CompreSSM).
"""

from transformers import AutoModelForCausalLM, Trainer, set_seed

from byte_tokenizer import byte_tokenizer
from common import fail, parse_arguments, state_sizes
from hf_compressm import CompreSSMCallback
from pretrain_clm import DEFAULTS, DataArguments, collate, load_sequences

OWN_DEFAULTS = DEFAULTS | {
    "output_dir": "outputs/rollback",
    "hidden_size": 64,
    "state_size": [64],
    "num_hidden_layers": 2,
    "sequence_length": 128,
    "max_steps": 400,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "start": 100,
    "end": 400,
    "num_reductions": 6,
    "reduction_fraction": 0.5,
    "rollback_metric": "loss",
    "rollback_tolerance": 0.02,
}


def main(args: list[str] | None = None) -> None:
    """Train, and tell what became of each reduction."""
    model_args, data_args, compression, training = parse_arguments(DataArguments, __doc__, OWN_DEFAULTS, args)
    set_seed(training.seed)
    tokenizer = byte_tokenizer()
    try:
        train, validation = load_sequences(data_args, tokenizer)
        model = AutoModelForCausalLM.from_config(model_args.config(vocab_size=len(tokenizer)))
    except ValueError as error:
        fail(error)
    callback = CompreSSMCallback(compression)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    final = trainer.evaluate()
    trainer.save_model()
    for event in callback.report.events:
        sizes = ", ".join(f"{layer.before} → {layer.after}" for layer in event.layers)
        verdict = "stays" if event.rolled_back_at is None else f"taken back at step {event.rolled_back_at}"
        losses = f"{event.metric_before or 0:.4f} → {event.metric_after or 0:.4f}"
        print(f"step {event.step}: states {sizes}; validation loss {losses}: {verdict}")
    print(f"at the end: states {state_sizes(model.config)}, validation loss {final['eval_loss']:.3f} nats per byte")


if __name__ == "__main__":
    main()
