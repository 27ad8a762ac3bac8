"""Saved models with their code beside them, loaded where this package cannot be imported."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_lm
from transformers import MambaConfig, MambaForCausalLM
from transformers.dynamic_module_utils import get_imports

from hf_compressm import (
    MimoSSMConfig,
    MimoSSMForSequenceClassification,
    ReducibleMamba2Config,
    ReducibleMamba2ForCausalLM,
    ReducibleMambaConfig,
    ReducibleMambaForCausalLM,
    compress,
)
from hf_compressm.hub import bundle_remote_code

SIZES = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
# one process for all models: it cannot import the package, and compares with what the package computed
SCRIPT = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compressm":
            raise ModuleNotFoundError("the package is not here")


sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

expected = torch.load(sys.argv[1] + "/expected.pt")
models = {}
for name, values in expected.items():
    auto = AutoModelForSequenceClassification if "classes" in values else AutoModelForCausalLM
    models[name] = auto.from_pretrained(f"{sys.argv[1]}/{name}", trust_remote_code=True).eval()
    assert type(models[name]).__module__.startswith("transformers_modules"), type(models[name])
for name in [*models, *models]:  # code that comes with one must not change another, before it has run or after
    values, model = expected[name], models[name]
    if "classes" in values:
        assert torch.equal(model(input_values=values["inputs"]).logits, values["classes"]), name
    else:
        assert torch.equal(model.generate(values["inputs"], max_new_tokens=6, do_sample=False), values["tokens"]), name
    print(name, [layer.state_size for layer in model.config.per_layer_config])
try:
    import hf_compressm
except ModuleNotFoundError:
    print("without the package")
"""


def unequal_mamba():
    torch.manual_seed(0)
    per_layer = {1: {"state_size": 3}}
    return ReducibleMambaForCausalLM(ReducibleMambaConfig(**SIZES, per_layer_config=per_layer))


def mamba2_with_maps():
    torch.manual_seed(0)
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1}
    model = ReducibleMamba2ForCausalLM(ReducibleMamba2Config(**SIZES, **heads))
    ids = torch.randint(0, 64, (4, 32))
    compress(model, target_state_size=4, dataloader=[{"input_ids": ids}])
    assert model.config.per_layer_config[0].conv_state_size == 8
    return model


def reduced_lru():
    model = tiny_lm(state_size=16)
    compress(model, tolerance=0.2)
    return model


MODELS = {
    "mamba": unequal_mamba,
    "mamba_too": unequal_mamba,
    "mamba2": mamba2_with_maps,
    "mamba2_too": mamba2_with_maps,
    "lru": reduced_lru,
    "lru_too": reduced_lru,
}


def test_models_run_without_the_package(tmp_path, repo_env):
    ids = torch.tensor([[5, 6, 7]])
    expected = {}
    for name, make in MODELS.items():
        model = make().eval()
        model.save_pretrained(tmp_path / name)
        assert bundle_remote_code(tmp_path / name)
        expected[name] = {"inputs": ids, "tokens": model.generate(ids, max_new_tokens=6, do_sample=False)}
    config = MimoSSMConfig(input_size=2, hidden_size=8, state_size=4, num_hidden_layers=1, num_labels=3)
    model = MimoSSMForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "classes")
    bundle_remote_code(tmp_path / "classes")
    values = torch.randn(2, 9, 2)
    with torch.no_grad():
        expected["classes"] = {"inputs": values, "classes": model(input_values=values).logits}
    torch.save(expected, tmp_path / "expected.pt")

    env = {key: value for key, value in repo_env.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be used" not in done.stderr
    assert done.stdout.splitlines()[0] == "mamba [8, 3]"
    assert done.stdout.splitlines()[-1] == "without the package"


def test_the_files_import_nothing_of_the_package(tmp_path):
    unequal_mamba().save_pretrained(tmp_path)
    written = bundle_remote_code(tmp_path)
    names = {path.stem for path in written}
    for path in written:
        # what transformers' loader insists on; numba, for example, is optional
        assert (
            set(get_imports(path)) <= {"huggingface_hub", "numpy", "torch", "transformers"} | sys.stdlib_module_names
        )
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module in names
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "hf_compressm" not in ast.unparse(node)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_reducible_mamba.ReducibleMambaForCausalLM"
    )


def test_stock_models_need_no_code_and_a_directory_without_a_model_is_an_error(tmp_path):
    MambaForCausalLM(MambaConfig(**SIZES)).save_pretrained(tmp_path / "stock")
    assert bundle_remote_code(tmp_path / "stock") == []
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        bundle_remote_code(tmp_path)
