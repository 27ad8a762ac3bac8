"""The loop without a Trainer, on one process and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_compressm import CompressionReport

RUNS = Path(__file__).parent / "accelerate_runs.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = ["--config_file", str(EXAMPLES / "accelerate_configs" / "cpu.yaml")]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_a_state_saved_between_two_reductions(tmp_path, repo_env, processes):
    """A freshly built model of the full size takes the smaller one, with moments and replicas: bit for bit."""
    text = tmp_path / "text.txt"
    text.write_bytes((EXAMPLES / "data" / "tinyshakespeare.txt").read_bytes()[:20_000])
    launch = ["-m", "accelerate.commands.launch", *CPU] if processes > 1 else []
    command = [sys.executable, *launch, str(RUNS), str(tmp_path), str(text)]
    done = subprocess.run(command, env=repo_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    states = {path.name for path in (tmp_path / "straight" / "state-6").glob("random_states_*.pkl")}
    assert states == {f"random_states_{rank}.pkl" for rank in range(processes)}
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    reports = [CompressionReport.load(tmp_path / name) for name in ("straight", "resumed")]
    sizes = [[[layer.after for layer in event.layers] for event in report.events] for report in reports]
    assert sizes[0] == sizes[1]
    assert [event.step for event in reports[1].events] == [4, 8]
    assert 16 > sizes[0][0][0] > sizes[0][1][0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "straight")
    assert [layer.state_size for layer in model.config.per_layer_config] == sizes[0][1]
