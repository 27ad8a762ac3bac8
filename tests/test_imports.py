"""The import direction of the package, and what importing it brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_compressm

PACKAGE = Path(hf_compressm.__file__).parent

# what each part may import of ours, besides itself; lower lines may use higher ones, never the reverse
ALLOWED = {
    "config": set(),
    "plotting": set(),
    "report": {"plotting"},
    "mor": set(),
    "ops": set(),
    "surgery": set(),
    "models": {"ops", "surgery"},
    "fast_scans": {"models", "ops"},
    "reducers": {"mor", "ops", "models", "surgery"},
    "param_groups": {"reducers"},
    "observation": {"reducers", "surgery"},
    "search": set(),
    "compression": {"config", "report", "mor", "models", "reducers", "surgery", "observation", "search"},
    "analysis": {"config", "report", "surgery", "observation", "compression"},
    "hub": {"config", "report", "models"},
    # pushes happen inside the Trainer, and have to carry what `hub` makes
    "training": {
        *("config", "report", "surgery", "reducers", "param_groups", "observation", "compression", "analysis", "hub")
    },
    "calibration_data": set(),
    "cli": {"config", "observation", "compression", "analysis", "hub", "training", "calibration_data"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all that a file imports: `hf_compressm.mor.rank` for `from ..mor import rank`."""
    package = ["hf_compressm", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = part(path)
    assert own in ALLOWED, f"hf_compressm/{own} is new: say in ALLOWED what it may import"
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("hf_compressm.")}
    assert used <= ALLOWED[own] | {own}, f"{own} imports {sorted(used - ALLOWED[own] - {own})}"


def test_allowed_has_no_cycle():
    known = set()
    for name, used in ALLOWED.items():
        assert used <= known, f"{name} may import {sorted(used - known)}, which stand below it"
        known.add(name)


@pytest.mark.parametrize("name", ["mor", "ops"])
def test_mathematics_is_pure_torch(name):
    allowed = {"torch", "hf_compressm"} | sys.stdlib_module_names
    for path in (PACKAGE / name).rglob("*.py"):
        if path.name in ("_fused_kernels.py", "_lru_triton.py"):  # only imported where numba or Triton is installed
            continue
        assert {module.split(".")[0] for module in imported_modules(path)} <= allowed, path


def test_public_names_exist():
    assert not [name for name in hf_compressm.__all__ if not hasattr(hf_compressm, name)]


def test_extras_are_optional(repo_env):
    extras = [
        "matplotlib",
        "mamba_ssm",
        "causal_conv1d",
        "numba",
        "peft",
        "PIL",
        "pymor",
        "scipy",
        "sklearn",
        "tensorboard",
        "triton",
    ]
    script = f"import sys; sys.modules.update(dict.fromkeys({extras})); import hf_compressm; print('imported')"
    done = subprocess.run([sys.executable, "-c", script], env=repo_env, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "imported"
