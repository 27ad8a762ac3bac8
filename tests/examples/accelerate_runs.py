"""Launched by test_pretrain_accelerate.py on one or more processes: a run, and what is left of it from a saved state.

Arguments: directory, text file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain_accelerate

if __name__ == "__main__":
    directory, text = sys.argv[1:]
    pretrain_accelerate.Accelerator.end_training = lambda self: None  # which ends the process group
    model = "--model_type reducible_mamba2 --hidden_size 16 --state_size 16 --num_hidden_layers 2 --sequence_length 32"
    reductions = "--tolerance 0.2 --start 0 --end 8 --num_reductions 2 --calibration_batches 2"
    loop = "--max_steps 10 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --logging_steps 10"
    options = f"{model} {reductions} {loop}".split()
    saved = ["--resume_from", f"{directory}/straight/state-6"]
    for name, more in {"straight": ["--save_steps", "6"], "resumed": saved}.items():
        pretrain_accelerate.main(["--train_file", text, "--output_dir", f"{directory}/{name}", *options, *more])
