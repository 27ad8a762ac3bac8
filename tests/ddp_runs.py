"""Runs that test_distributed.py makes in its own process and, launched by torchrun, on two ranks at once."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import Windows, batch, tiny_lm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_compressm import (
    CompreSSMCallback,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    UnsupportedSetupError,
    compress,
)
from hf_compressm.surgery import replicas

BATCH = 8  # sequences per step, over all ranks
SIZES = {"vocab_size": 256, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 16}


def make_model(architecture):
    torch.manual_seed(0)
    match architecture:
        case "mimo_ssm":
            return tiny_lm(state_size=32)
        case "one_layer":
            return tiny_lm(state_size=32, layers=1)
        case "mamba":
            return MambaForCausalLM(MambaConfig(**SIZES))
        case "reducible_mamba":
            return ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES))
        case "reducible_mamba2":
            config = ReducibleMamba2Config(**SIZES, num_heads=2, head_dim=8, n_groups=2)
            return ReducibleMamba2ForCausalLM(config)


SHORT = {"max_steps": 6}
COMPILED = {"max_steps": 4, "torch_compile": True, "torch_compile_backend": "aot_eager"}
TRAINER_RUNS = {
    **{name: (name, {}, {}) for name in ("mimo_ssm", "reducible_mamba", "reducible_mamba2")},
    "adamw": ("reducible_mamba2", SHORT | {"optim": "adamw_torch"}, {}),
    "accumulation": ("reducible_mamba", SHORT | {"gradient_accumulation_steps": 2}, {}),
    "checkpointing": ("mimo_ssm", SHORT | {"activation_checkpointing": True, "ddp_static_graph": True}, {}),
    "find_unused": ("mimo_ssm", SHORT | {"ddp_find_unused_parameters": True}, {}),
    "static_graph": ("reducible_mamba2", SHORT | {"ddp_static_graph": True}, {}),
    "stock": ("mamba", SHORT, {}),
    "compiled": ("one_layer", COMPILED, {}),
    "bf16": ("reducible_mamba", SHORT | {"bf16": True}, {}),
    "loss": ("mimo_ssm", SHORT, {"tolerance": None, "max_loss_increase": 0.5}),
    "kept": ("mimo_ssm", SHORT, {"tolerance": None, "max_loss_increase": 1e-12, "min_reduction": 0.9}),
}
"""By name: architecture, options of the Trainer, options of the callback."""


def trainer_run(name, output, callbacks=()):
    """Train with three reductions on what is `BATCH` sequences per step, on however many ranks."""
    architecture, options, compression = TRAINER_RUNS[name]
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    options = {"optim": "sgd", "max_steps": 65} | options
    args = TrainingArguments(
        str(output),
        per_device_train_batch_size=BATCH // ranks // options.get("gradient_accumulation_steps", 1),
        learning_rate=0.01 if options["optim"] == "sgd" else 3e-3,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **{"ddp_find_unused_parameters": False} | options,
    )
    schedule = {"end": 15, "num_reductions": 3} if args.max_steps == 65 else {"end": 3, "num_reductions": 1}
    callback = CompreSSMCallback(**{"tolerance": 0.1, "start": 0} | schedule | compression)
    model = make_model(architecture)
    trainer = Trainer(model=model, args=args, train_dataset=Windows(length=32), callbacks=[*callbacks, callback])
    trainer.train()
    return model


class SpoilOneRank(TrainerCallback):
    """Changes a weight on the second rank."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 1e-3


def diverged(output):
    """Ranks that no longer agree stop the run."""
    try:
        trainer_run("find_unused", output, [SpoilOneRank()])
    except RuntimeError as error:
        return str(error)


def loop(hook, state=None):
    """A loop without Trainer or Accelerate, with a communication hook on the gradients, and one reduction in it."""
    model = tiny_lm(state_size=32)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, hook)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=3e-3)
    rows = batch()["input_ids"].chunk(2)[dist.get_rank()]
    for step in range(8):
        ddp(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            compress(ddp, tolerance=0.1, optimizer=optimizer)
    return model


def unwrapped():
    """A model that nothing wraps is calibrated with other data on each rank, and decided on once."""
    model = make_model("reducible_mamba")
    rows = batch()["input_ids"].chunk(2)[dist.get_rank()]
    compress(model, tolerance=0.1, dataloader=[{"input_ids": rows}])
    return model


def different():
    """Ranks with different models have nothing to decide together."""
    try:
        compress(tiny_lm(state_size=32, seed=dist.get_rank()), tolerance=0.1)
    except UnsupportedSetupError as error:
        return str(error)


def absent():
    """The second rank does not take part; then both do, and all is well."""
    model = tiny_lm(state_size=32)
    message = None
    if dist.get_rank() == 0:
        patience, replicas._PATIENCE = replicas._PATIENCE, replicas.timedelta(seconds=1)
        try:
            compress(model, tolerance=0.1)
        except RuntimeError as error:
            message = str(error)
        replicas._PATIENCE = patience
    dist.barrier()
    compress(model, tolerance=0.1)
    return message


def main(output: Path) -> None:
    """Every run, each saved by both ranks: a model's weights and config, or what the run returned."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    runs = {name: lambda name=name: trainer_run(name, output) for name in TRAINER_RUNS}
    runs |= {
        "fp16_hook": lambda: loop(default_hooks.fp16_compress_hook),
        "power_hook": lambda: loop(powerSGD_hook.powerSGD_hook, power),
        "unwrapped": unwrapped,
        "different": different,
        "absent": absent,
        "diverged": lambda: diverged(output),
    }
    for name, run in runs.items():
        found = run()
        if isinstance(found, torch.nn.Module):
            found = {"weights": found.state_dict(), "config": found.config.to_dict()}
        torch.save(found, output / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
