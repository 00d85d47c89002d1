"""P43: reading a recipe and finding plugins must not cost an import of torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = [
    f"core.contracts.{name}" for name in ("errors", "schema", "schedule", "component", "corpus")
]
PACKAGES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("recipe", "extension")
    for file in sorted((ROOT / "core" / package).glob("*.py"))
]
SCRIPT = """
import importlib, json, sys

HEAVY = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "transformers", "numpy", "tokenizers")
loaded = {}
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
    loaded[module] = [name for name in HEAVY if name in sys.modules]
from core.extension.loader import installed_registry
broken = [str(broken) for broken in installed_registry().broken]
loaded["every plugin"] = [name for name in HEAVY if name in sys.modules]
print(json.dumps([loaded, broken]))
"""


def test_P43_the_light_packages_and_every_plugin_module_import_nothing_heavy() -> None:
    modules = ["core", *CONTRACTS, *PACKAGES]
    command = [sys.executable, "-c", SCRIPT, json.dumps(modules)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, broken = json.loads(done.stdout)
    assert broken == []
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {}
    assert set(loaded) == {*modules, "every plugin"}
    assert {"core.recipe.compose", "core.extension.loader"} <= set(loaded)
