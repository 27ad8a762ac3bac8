"""What a reduction costs, observation included, in training steps of the same model: random tokens, AdamW, one thread.

python -m benchmarks event_cost
"""

import argparse
import time
from statistics import median

import torch

from hf_compressm import (
    CompressionConfig,
    MimoSSMConfig,
    MimoSSMForCausalLM,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
)
from hf_compressm.compression import compress_once, observe

from .common import save_results

FAMILIES = {
    "mimo_ssm": (MimoSSMConfig, MimoSSMForCausalLM, {}),
    "mamba": (ReducibleMambaConfig, ReducibleMambaForCausalLM, {}),
    "mamba2": (ReducibleMamba2Config, ReducibleMamba2ForCausalLM, {"head_dim": 64, "n_groups": 1}),
}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks event_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--state_size", type=int, default=128)
    parser.add_argument("--target", type=int, default=32, help="states after the reduction")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = {}
    for family in FAMILIES:
        rows[family] = row = measure(family, options)
        print(
            f"{family:>8}: training step {row['step']:.2f} s; observation of {row['batches']} batches "
            f"{row['observation']:.2f} s, reduction {row['reduction']:.2f} s: {row['steps']:.1f} steps (CPU time)",
            flush=True,
        )
    save_results("event_cost", {"options": vars(options), "rows": rows})


def measure(family: str, options: argparse.Namespace) -> dict:
    """CPU seconds of a step, of what observing adds to the steps before an event, and of the event."""
    make_config, make_model, fields = FAMILIES[family]
    if family == "mamba2":
        fields = fields | {"num_heads": 2 * options.hidden_size // fields["head_dim"]}
    sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers}
    torch.manual_seed(0)
    model = make_model(make_config(vocab_size=256, state_size=options.state_size, **sizes, **fields)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (options.batch, options.length))

    def seconds(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    plain = median(seconds(step) for _ in range(3))
    config = CompressionConfig(target_state_size=options.target)
    observation = observe(model, config)
    observation.start()
    observed = sum(seconds(step) for _ in range(config.calibration_batches))
    observation.stop()
    event = seconds(lambda: compress_once(model, config, optimizer, observation))
    extra = max(0.0, observed - config.calibration_batches * plain)
    return {
        "step": plain,
        "batches": config.calibration_batches if observation.needed else 0,
        "observation": extra,
        "reduction": event,
        "steps": (extra + event) / plain,
    }
