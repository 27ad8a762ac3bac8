"""Runs under FSDP2 that test_fsdp.py launches on two processes; results are saved by the first.

Arguments: directory.
"""

import sys
from pathlib import Path

import ddp_runs
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from runs import arguments
from tiny import Windows, batch, tiny_lm
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers import AutoModelForCausalLM, Trainer

from hf_compressm import CompreSSMCallback, analyze, compress
from hf_compressm.surgery.sharding import whole

LOOPS = {"mimo_ssm": ("auto", "adamw"), "reducible_mamba": ("auto", "sgd"), "reducible_mamba2": ("selection", "adamw")}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
}
FSDP2 = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}


def shard(model, mesh=None):
    mesh = init_device_mesh("cpu", (2,)) if mesh is None else mesh
    for layer in (model.model if hasattr(model, "model") else model.backbone).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loop(architecture, ranks):
    """Three reductions in 16 steps; the weights and the optimizer's state at the end, whole."""
    method, optim = LOOPS[architecture]
    model = ddp_runs.make_model(architecture)
    rows = batch(8, 32)["input_ids"]
    if ranks > 1:
        shard(model)
        rows = rows.chunk(2)[dist.get_rank()]
    marked = {name for name, param in model.named_parameters() if getattr(param, "_no_weight_decay", False)}
    optimizer = OPTIMIZERS[optim](model.parameters())
    for step in range(1, 17):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (4, 8, 12):
            data = [{"input_ids": rows}]
            compress(model, tolerance=0.1, optimizer=optimizer, dataloader=data, method=method)
    assert marked == {name for name, param in model.named_parameters() if getattr(param, "_no_weight_decay", False)}
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    state = {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }
    return {"weights": weights, "state": state, "config": model.config.to_dict()}


def trainer(path, model=None, dry_run=False, **fsdp):
    """The stock Trainer with the FSDP2 plug-in of Accelerate, which takes no CPUs unless they pass for GPUs."""
    sharded = {"fsdp": True, "fsdp_config": FSDP2 | {"transformer_layer_cls_to_wrap": ["MimoSSMBlock"]} | fsdp}
    saving = {"save_strategy": "steps", "save_steps": 6, "ddp_backend": "gloo", "max_steps": 15}
    args = arguments(path, **sharded | saving)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = CompreSSMCallback(tolerance=0.1, start=0, end=12, num_reductions=3, dry_run=dry_run)
    model = tiny_lm(state_size=32) if model is None else model
    made = Trainer(model=model, args=args, train_dataset=Windows(), callbacks=[callback])
    assert made.is_fsdp_enabled
    return made


def trainer_runs(directory):
    """A run with reductions at steps 4, 8 and 12, and the rest of it from step 6 with a model of that size."""
    trainer(directory / "straight").train()
    checkpoint = directory / "straight" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer(directory / "resumed", model).train(resume_from_checkpoint=str(checkpoint))
    return {
        "full size": message(lambda: trainer(directory / "full").train(resume_from_checkpoint=str(checkpoint))),
        "dry run": message(trainer(directory / "dry", dry_run=True).train),
        "shards": message(trainer(directory / "shards", state_dict_type="SHARDED_STATE_DICT").train),
    }


def message(run):
    """What a set-up is refused with."""
    try:
        run()
    except ValueError as error:
        return str(error)


def tensor_parallel():
    model, mesh = tiny_lm(), init_device_mesh("cpu", (2,))
    head = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(head.detach(), mesh, [Replicate()]))
    assert isinstance(model.lm_head.weight.data, DTensor)
    compress(model)


REFUSED = {
    "rollback": lambda: compress(shard(tiny_lm()), rollback_metric="loss"),
    "loss": lambda: compress(shard(tiny_lm()), max_loss_increase=0.1),
    "new parameters": lambda: compress(
        shard(ddp_runs.make_model("reducible_mamba2")), dataloader=[batch(2, 32)], tolerance=0.1
    ),
    "hybrid": lambda: compress(
        shard(tiny_lm(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))), tolerance=0.1
    ),
    "tensor parallel": tensor_parallel,
    "analysis": lambda: analyze(shard(tiny_lm())),
}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo")
    found = {name: loop(name, ranks=2) for name in LOOPS}
    found |= {name: message(run) for name, run in REFUSED.items()}
    found |= trainer_runs(directory)
    if dist.get_rank() == 0:
        torch.save(found, directory / "found.pt")
