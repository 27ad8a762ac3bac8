"""Pushes to a stand-in that speaks the Hub's HTTP calls."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import pytest
from hub.hub_server import serve
from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_compressm import CompressionReport

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE / "model_card_schema.json").read_text())
OURS = {"README.md", "compression_plot.png", "compression_report.json", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, repo_env):
    """Directory of the stand-in after `push_script.py`, and what that printed."""
    root = tmp_path_factory.mktemp("hub")
    server = serve(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"}
    env = {key: value for key, value in repo_env.items() if key not in offline} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, str(HERE / "push_script.py"), str(root / "output")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def commits(root, repo):
    return [commit for commit in json.loads((root / "commits.json").read_text()) if commit["repo"] == repo]


def card(root, name):
    return ModelCard.load(root / "repos" / name / "README.md")


def test_every_push_carries_report_figure_card_and_code(hub):
    root, _ = hub
    messages = {c["message"]: set(c["files"]) for c in commits(root, "someone/my-ssm")}
    middle, end = messages["Training in progress, step 6"], messages["End of training"]
    for files in (middle, end, set(commits(root, "someone/from-model")[0]["files"])):
        assert files >= OURS | {"modeling_mimo_ssm.py", "configuration_mimo_ssm.py", "ops_lru.py"}
    checkpoint = messages["Training in progress, step 6, checkpoint"]
    assert checkpoint >= {f"last-checkpoint/{name}" for name in OURS | {"optimizer.pt", "modeling_mimo_ssm.py"}}


def test_nothing_else_is_pushed(hub):
    root, _ = hub
    files = [name for commit in commits(root, "someone/my-ssm") for name in commit["files"]]
    assert not [name for name in files if "snapshot" in name or name.startswith(("_", "checkpoint-"))]
    assert (root / "output" / "my-ssm" / "_snapshot" / "model.safetensors").exists()


def test_the_card_is_ours_also_after_the_trainer_wrote_its_own(hub):
    root, _ = hub
    pushed = card(root, "someone/my-ssm")
    jsonschema.validate(pushed.data.to_dict(), SCHEMA)
    assert "balanced truncation" in pushed.text
    assert pushed.data.license == "mit"
    assert pushed.data.eval_results[0].dataset_name == "bytes of plays"
    assert "This model was trained from scratch on" not in pushed.text  # the Trainer's
    last = ModelCard.load(root / "repos" / "someone/my-ssm/last-checkpoint/README.md")
    assert "balanced truncation" in last.text


def test_the_card_of_model_push_is_ours_and_keeps_its_tags(hub):
    root, _ = hub
    pushed = card(root, "someone/from-model")
    assert pushed.data.model_name == "from-model"
    assert {"mine", "compressm"} <= set(pushed.data.tags)
    assert "balanced truncation" in pushed.text


def test_what_was_pushed_is_the_reduced_model(hub):
    root, printed = hub
    assert "reloaded from the Hub" in printed
    for name in ("someone/my-ssm", "someone/from-model"):
        directory = root / "repos" / name
        config = AutoConfig.from_pretrained(directory)
        assert [layer.state_size for layer in config.per_layer_config] == [4, 4]
        assert config.auto_map["AutoModelForCausalLM"] == "modeling_mimo_ssm.MimoSSMForCausalLM"
        assert [layer.after for layer in CompressionReport.load(directory).events[-1].layers] == [4, 4]


def test_the_hub_was_asked_to_validate_the_metadata(hub):
    root, _ = hub
    assert "model-index" in json.loads((root / "validated.json").read_text())["content"]
