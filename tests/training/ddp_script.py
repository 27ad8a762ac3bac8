"""Launched by test_distributed.py with torchrun: trains with reductions and saves what rank 0 and rank 1 hold."""

import os
import sys

import torch
import torch.distributed as dist
from tiny import Windows, tiny_lm
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, ReducibleMamba2Config, ReducibleMamba2ForCausalLM


def mamba2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 32}
    return ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1))


if __name__ == "__main__":
    output, architecture, optim, per_device, find_unused = sys.argv[1:]
    model = mamba2() if architecture == "mamba2" else tiny_lm(state_size=32)
    args = TrainingArguments(
        output,
        max_steps=30,
        per_device_train_batch_size=int(per_device),
        learning_rate=0.3 if optim == "sgd" else 3e-3,
        optim=optim,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=find_unused == "True",
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    rule = {"max_loss_increase": 1e-12, "min_reduction": 0.9} if architecture == "kept" else {"tolerance": 0.1}
    callback = CompreSSMCallback(**rule, start=0, end=15, num_reductions=3)
    trainer = Trainer(model=model, args=args, train_dataset=Windows(), callbacks=[callback])
    trainer.train()
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save({"weights": model.state_dict(), "config": model.config.to_dict()}, f"{output}/rank-{rank}.pt")
