"""Train a language model from scratch with a loop of your own on Accelerate, and shrink its state on the way.

Without arguments: bytes, and a few minutes on two cores with the text in examples/data. On several processes:
`accelerate launch --config_file examples/accelerate_configs/cpu.yaml examples/pretrain_accelerate.py`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_scheduler

from common import fail, parse_arguments, state_sizes
from hf_compressm import CompressionReport, accept_other_sizes, compress, ssm_param_groups
from pretrain_clm import DataArguments, collate, load_sequences, load_tokenizer


@dataclass
class LoopArguments:
    """The training loop."""

    output_dir: str = field(
        default="outputs/pretrain_accelerate", metadata={"help": "Where model, report and states go."}
    )
    max_steps: int = field(default=500, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sequences per process and micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Of all but the recurrences."})
    ssm_learning_rate: float | None = field(default=None, metadata={"help": "Of the recurrences; default: the same."})
    warmup_steps: int = field(default=25, metadata={"help": "Steps until the full learning rate."})
    logging_steps: int = field(default=50, metadata={"help": "Steps from line to line."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps from state to state. Default: none."})
    resume_from: str | None = field(default=None, metadata={"help": "A directory `state-N` to go on from."})
    seed: int = field(default=42, metadata={"help": "Of everything random."})


class Progress:
    """What a saved state holds besides model, optimizer, schedule and random numbers."""

    def __init__(self, report: CompressionReport):
        self.step = 0
        self.report = report

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.save_state`."""
        return {"step": self.step, "report": self.report.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `accelerator.load_state`."""
        self.step, self.report = state["step"], CompressionReport.from_dict(state["report"])


def batches(accelerator: Accelerator, loader: DataLoader, done: int):
    """Micro-batches of all epochs, after the first `done` ones."""
    epoch, within = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, within) if within else loader
        epoch, within = epoch + 1, 0


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> float:
    """Mean loss on the validation sequences."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.repeat(len(batch["input_ids"]))) for batch in loader]
    model.train()
    return torch.cat(losses).mean().item()


def main(args: list[str] | None = None) -> None:
    """Train, reduce, save."""
    model_args, data_args, compression, loop = parse_arguments(DataArguments, __doc__, {}, args, LoopArguments)
    # the order of the data follows from seed and epoch alone, so that a resumed run sees what is left of it
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=loop.seed)
    accelerator = Accelerator(
        gradient_accumulation_steps=loop.gradient_accumulation_steps,
        dataloader_config=loading,
        cpu=not torch.accelerator.is_available(),
    )
    set_seed(loop.seed)
    try:
        tokenizer = load_tokenizer(data_args)
        config = model_args.config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with accelerator.main_process_first():
            train, validation = load_sequences(data_args, tokenizer)
        events = compression.events(loop.max_steps) if model_args.do_compress else []
        if loop.resume_from and not Path(loop.resume_from).is_dir():
            raise ValueError(f"there is no state to resume from in {loop.resume_from}")
    except ValueError as error:
        fail(error)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(ssm_param_groups(model, loop.learning_rate, loop.ssm_learning_rate))
    # a prepared schedule takes a step for each process
    warmup, total = (steps * accelerator.num_processes for steps in (loop.warmup_steps, loop.max_steps))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=total)
    size = {"batch_size": loop.per_device_train_batch_size, "collate_fn": collate}
    loaders = (
        DataLoader(train, shuffle=True, drop_last=True, **size),
        DataLoader(train, **size),
        DataLoader(validation, **size),
    )
    model, optimizer, schedule, *loaders = accelerator.prepare(model, optimizer, schedule, *loaders)
    train_loader, calibration_loader, validation_loader = loaders

    progress = Progress(CompressionReport(compression.to_dict()))
    accelerator.register_for_checkpointing(progress)
    accept_other_sizes(model, optimizer)  # a saved state may hold a model that is smaller than this one
    if loop.resume_from:
        accelerator.load_state(loop.resume_from)
    unwrapped = accelerator.unwrap_model(model)
    accelerator.print(f"{unwrapped.num_parameters():,} parameters, state sizes {state_sizes(unwrapped.config)}")

    model.train()
    started = time.perf_counter()
    for batch in batches(accelerator, train_loader, progress.step * loop.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        if progress.step in events:
            report = compress(model, compression, calibration_loader, optimizer)
            report.events[0].step = progress.step
            progress.report.events += report.events
            accelerator.print(report.events[0])
        if progress.step % loop.logging_steps == 0 or progress.step == loop.max_steps:
            seconds = time.perf_counter() - started
            value = evaluate(accelerator, model, validation_loader)
            accelerator.print(f"step {progress.step}: validation loss {value:.3f}, {seconds:.0f} s")
        if loop.save_steps and progress.step % loop.save_steps == 0:
            accelerator.save_state(f"{loop.output_dir}/state-{progress.step}")
        if progress.step >= loop.max_steps:
            break

    accelerator.wait_for_everyone()
    unwrapped.save_pretrained(loop.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(loop.output_dir)
        progress.report.save(Path(loop.output_dir))
    accelerator.print(f"{unwrapped.num_parameters():,} parameters, state sizes {state_sizes(unwrapped.config)}")
    accelerator.print(f"saved to {loop.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
