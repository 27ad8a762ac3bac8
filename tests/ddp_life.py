"""What test_distributed_life.py does on one process and, launched by torchrun, on two: going back, resuming, dying."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_runs import make_model
from runs import make_trainer
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.surgery import Ranks
from hf_compressm.training import callback as callback_module
from hf_compressm.training.snapshot import SnapshotStore

BATCH = 4  # sequences per step, over all ranks
OPTIONS = {"max_steps": 12, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
OPTIONS |= {"save_strategy": "steps", "save_steps": 1, "ddp_find_unused_parameters": False}
JUDGED = {"target_state_size": 1, "start": 5, "end": 7, "num_reductions": 1, "rollback_metric": "loss"}
PLAIN = {"tolerance": 0.2, "start": 5, "end": 7, "num_reductions": 1}


class Worsens(TrainerCallback):
    """Makes the reduced model worse than any that has not been reduced."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 8:
            with torch.no_grad():
                model.lm_head.weight.mul_(-5)


def run(path, rule, resume=None, model=None, **options):
    """One run on what is `BATCH` sequences per step, on however many ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    options = OPTIONS | {"per_device_train_batch_size": BATCH // ranks} | options
    if rule is JUDGED:
        options |= {"eval_strategy": "steps", "eval_steps": 5}
    callbacks = [*([Worsens()] if rule is JUDGED else []), CompreSSMCallback(**rule)]
    trainer = make_trainer(path, model, callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def judged_apart(output):
    """From the checkpoint that waits for the decision, on a rank that does not see the other's files."""
    read = SnapshotStore.read

    def see(*args):
        if dist.get_rank() == 1:
            raise ValueError("no such file")
        return read(*args)

    SnapshotStore.read = see
    try:
        return run(output / "apart", JUDGED, resume=str(output / "judged" / "checkpoint-9"))
    finally:
        SnapshotStore.read = read


def sent(run):
    """What a run returns, and the types of all that the first rank hands out in it."""
    decide, types = Ranks.decide, []

    def listen(*args):
        decided = decide(*args)
        types.extend(type(part).__name__ for part in (decided if isinstance(decided, tuple) else [decided]))
        return decided

    Ranks.decide = listen
    try:
        return run(), types
    finally:
        Ranks.decide = decide


def die_while_deciding(output):
    """The second rank is gone when the first wants to tell what it decided."""
    compress_once = callback_module.compress_once

    def die(*args):
        if dist.get_rank() == 1:
            os._exit(13)
        return compress_once(*args)

    callback_module.compress_once = die
    run(output / "dies", PLAIN)
    (output / "survived").touch()


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank, results, types = dist.get_rank(), {}, {}
    results["judged"], types["judged"] = sent(lambda: run(output / "judged", JUDGED))
    results["apart"], types["apart"] = sent(lambda: judged_apart(output))
    results["resumed"] = run(output / "resumed", PLAIN, resume=True)
    results["seen"] = run(output / "seen", PLAIN, model=make_model("reducible_mamba"))
    torch.save(types, output / f"types-{rank}.pt")
    for name, trainer in results.items():
        torch.save(trainer.model.state_dict(), output / f"{name}-{rank}.pt")
    dist.barrier()
    die_while_deciding(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
