"""Run one benchmark: `python -m benchmarks NAME [--option value ...]`; without a name, `step_time`."""

import importlib
import pkgutil
import sys
from pathlib import Path


def main() -> None:
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_")]
    names.remove("common")
    name, *args = sys.argv[1:] or ["step_time"]
    if name in ("-h", "--help"):
        sys.exit(f"{__doc__}\nNames: {', '.join(names)}")
    if name not in names:
        sys.exit(f"error: expected one of {', '.join(names)}; found {name!r}. {__doc__}")
    importlib.import_module(f"benchmarks.{name}").main(args)


if __name__ == "__main__":
    main()
