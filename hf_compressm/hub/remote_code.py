"""The modeling code of a checkpoint, put beside its weights: for people who do not have this package."""

import ast
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.utils import CONFIG_NAME

PACKAGE = __name__.partition(".")[0]
_PRESENT = {"huggingface_hub", "numpy", "torch", "transformers"}
_AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)


def bundle_remote_code(directory: str | Path) -> list[Path]:
    """Write the code that a saved model of this package needs into its directory, and name it in its config.

    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` then works without this package. The
    files import nothing of it, and each other only by `from .module import name`, as transformers' loader wants it.

    Args:
        directory: of a saved model; its `config.json` gets an `auto_map`.

    Returns:
        The files written; none for architectures of transformers itself, which need none.

    Raises:
        ValueError: there is no model in the directory.
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"there is no {CONFIG_NAME} in {directory}: expected a saved model.")
    config = json.loads(path.read_text(encoding="utf-8"))
    config_class = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    if config_class is None or not config_class.__module__.startswith(f"{PACKAGE}."):
        return []
    config["auto_map"] = auto_map(config_class)
    written = []
    for module in _closure({cls.__module__ for cls in _classes(config_class).values()}):
        written.append(directory / f"{_flat_name(module)}.py")
        written[-1].write_text(_flattened(module), encoding="utf-8")
    unfinished = path.with_suffix(".tmp")  # a process killed here must not leave half a config
    unfinished.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return written


def auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Where `trust_remote_code` finds the classes of an architecture of this package."""
    return {name: f"{_flat_name(cls.__module__)}.{cls.__name__}" for name, cls in _classes(config_class).items()}


def _classes(config_class: type[PreTrainedConfig]) -> dict[str, type]:
    models = {auto.__name__: auto._model_mapping.get(config_class, None) for auto in _AUTO_CLASSES}
    return {"AutoConfig": config_class} | {name: cls for name, cls in models.items() if cls is not None}


def _flat_name(module: str) -> str:
    """Modules of models keep their names, others get those of their packages in front: `ops_lru`."""
    *parents, name = module.split(".")[1:]
    return name if name.startswith(("modeling_", "configuration_")) else "_".join([*parents, name])


def _source(module: str) -> tuple[str, bool]:
    """The source of a module, and whether it is a package."""
    spec = find_spec(module)
    return Path(spec.origin).read_text(encoding="utf-8"), spec.submodule_search_locations is not None


def _relative_imports(module: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """The imports of a module from this package, each with the absolute name of what it imports from."""
    source, is_package = _source(module)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + is_package]
            yield node, ".".join([*parents, *filter(None, [node.module])])


def _home(module: str, name: str) -> tuple[str, bool]:
    """The module that defines `name`, which `module` may only pass on; and whether `name` is that module itself."""
    if _source(module)[1]:
        for node, origin in _relative_imports(module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _home(origin, alias.name)
        if find_spec(f"{module}.{name}") is not None:
            return f"{module}.{name}", True
    return module, False


def _closure(modules: set[str]) -> list[str]:
    """These modules and all of this package that they need, sorted."""
    found, open_ = set(), set(modules)
    while open_:
        module = open_.pop()
        found.add(module)
        needed = {_home(origin, alias.name)[0] for node, origin in _relative_imports(module) for alias in node.names}
        open_ |= needed - found
    return sorted(found)


def _flattened(module: str) -> str:
    """The source of a module with its imports rewritten for a directory without packages."""
    source = _source(module)[0]
    lines = source.splitlines()
    changes = [(node, _flat_imports(node, origin)) for node, origin in _relative_imports(module)]
    changes += [(node, _optional(node)) for node in ast.parse(source).body if _needs_more(node)]
    for node, new in sorted(changes, key=lambda change: -change[0].lineno):
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    origin, version = module.replace(".", "/"), sys.modules[PACKAGE].__version__
    source = "\n".join([f"# From {origin}.py of hf-compressm {version}, Apache-2.0.", *lines]) + "\n"
    # Operators have one name in a process, in which another checkpoint may bring the same code along.
    return source.replace(f'custom_op("{PACKAGE}::', 'custom_op(__name__.replace(".", "_") + "::')


def _flat_imports(node: ast.ImportFrom, origin: str) -> list[str]:
    """The lines for an import from `origin`. The loader finds nothing but `from .module import name`."""
    names: dict[str, list[str]] = {}
    modules = []
    for alias in node.names:
        (home, is_module), called = _home(origin, alias.name), alias.asname or alias.name
        if is_module:
            modules += [f"from .{_flat_name(home)} import __name__ as {called}", "import sys"]
            modules += [f"{called} = sys.modules[{called}]"]
        else:
            as_name = f" as {alias.asname}" if alias.asname else ""
            names.setdefault(_flat_name(home), []).append(alias.name + as_name)
    return [f"from .{home} import {', '.join(imported)}" for home, imported in names.items()] + modules


def _needs_more(node: ast.stmt) -> bool:
    """Whether a statement imports a package that transformers does not bring along."""
    names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
    names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] not in _PRESENT | sys.stdlib_module_names for name in names)


def _optional(node: ast.stmt) -> list[str]:
    """An import that the loader does not insist on, because whoever imports this module does without it."""
    return ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
