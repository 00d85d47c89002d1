"""Writes a new plugin for the command `catalog new`, as a package or as one file, from templates in `skeletons/`."""

import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template

from core import contracts
from core.command import command_prefix
from core.contracts.errors import UserError, nearest
from core.extension.loader import installed_registry
from core.extension.plugin_file import is_plugin_file
from core.extension.registry import SLOTS

SUMMARIES = {
    "router": "softmax affinities, the best K of them.",
    "balancer": "a loss on how often experts are chosen, times how much affinity they get.",
    "attention": "causal attention with a single head.",
    "ffn": "two matrices with a ReLU between them.",
    "loss_head": "next-token prediction with smoothed labels.",
    "precision": "everything in fp32.",
    "residual": "a stream to which outputs are added with a factor.",
    "dispatcher": "rows that move within one device.",
    "optimizer": "stochastic gradient descent with momentum.",
    "corpus": "made-up words.",
    "strategy": "one process on one device.",
    "callback": "a file of the largest weights.",
    "logger": "a file with a line of JSON for each row.",
    "checkpoint_format": "dense transformers with plain names.",
}
RECIPES = {
    "router": "model: {blocks: {moe: {ffn: {router: {name: $name, top_k: 4}}}}}",
    "balancer": "model: {blocks: {moe: {ffn: {balance: [{name: bias, rate: 0.001}, {name: $name, alpha: 0.01}]}}}}",
    "attention": """\
model:
  blocks: # with the blocks, because the small sizes that dsv3_small has for smoke runs are those of its own attention
    dense: {attention: {name: $name, width: 64}}
    moe: {attention: "$${model.blocks.dense.attention}"}""",
    "ffn": "model: {blocks: {dense: {ffn: {name: $name, hidden: 768}}}}",
    "loss_head": "model: {heads: {next_token: {name: $name, smoothing: 0.1}}}",
    "precision": "precision: {name: $name}",
    "residual": "model: {residual: {name: $name, scale: 0.5}}",
    "dispatcher": "model: {blocks: {moe: {ffn: {dispatcher: {name: $name}}}}}",
    "optimizer": "optimizer: {name: $name, lr: 0.03}",
    "corpus": "data: {corpus: {name: $name}}",
    "strategy": "strategy: {name: $name}",
    "callback": "callbacks: [{name: $name, every_steps: 100}]",
    "logger": "loggers: [{name: csv}, {name: $name}]",
    "checkpoint_format": """\
# A recipe names no format: with `plugins` above, `convert` knows it for runs of this recipe. It can write a run whose
# model `config_of` accepts: one block group of mha and swiglu, and next_token as the only head.""",
}
OWN_TESTS = frozenset({"checkpoint_format"})
"""Slots whose component no recipe names, so that their package has another test than the others."""
FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "$name.yaml": "recipe.yaml.txt",
    "$name/__init__.py": "init.py.txt",
    "$name/$slot.py": "$slot.py.txt",
    "tests/test_$name.py": "test.py.txt",
}
"""The files of a package, and the template of each."""
HOOKS = "from core.extension.hookspec import Registrar, hookimpl\n"
"""What a plugin of one file imports beside what its component needs."""
RESERVED = frozenset(
    [
        "build",
        "conftest",
        "data",
        "dist",
        "doc",
        "docs",
        "env",
        "examples",
        "moeloom",
        "runs",
        "setup",
        "src",
        "tests",
    ]
)
"""Names that a package must not have: folders beside it, files that Python and pytest read, this distribution."""


def write_skeleton(slot: str, name: str, folder: str | Path) -> list[str]:
    """Writes the package of a plugin with one component that works, or a file with it.

    Args:
        slot: the slot of the component.
        name: its name in recipes; the package and its entry point have the same name.
        folder: receives the files; it must not exist yet, or be empty. If its name ends in `.py`, it is the one file
            that is written.

    Returns:
        The paths of the files, relative to the folder.

    Raises:
        UserError: there is no such slot, or no skeleton for it; the name cannot be that of a package, or is taken;
            the folder is not empty, or cannot be written.
    """
    _check_slot(slot)
    _check_name(slot, name)
    root = Path(folder)
    if is_plugin_file(root.name):
        return [_write_file(slot, name, root)]
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists already and is not an empty folder; name another one")
    texts = dict(_texts(slot, name))
    try:
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
    except OSError as cause:
        raise UserError(f"{root} cannot be written: {cause.strerror}") from cause
    return list(texts)


def _write_file(slot: str, name: str, file: Path) -> str:
    """Writes a plugin of one file, which a recipe names by its path."""
    if file.exists():
        raise UserError(f"{file} exists already; name another file")
    words = _words(slot, name)
    words["target"] = f"{file.stem}:{words['cls']}"
    lines = Template(_read(f"{slot}.py.txt")).substitute(words).splitlines(keepends=True)
    registration = Template(_read("registration.txt")).substitute(words)
    imports = [number for number, line in enumerate(lines) if line.startswith("from core.contr")]
    begin = next(number for number, line in enumerate(lines) if line.startswith("class "))
    lines.insert(begin, registration)
    lines.insert(imports[-1] + 1, HOOKS)
    text = "".join(lines)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise UserError(f"{file} cannot be written: {cause.strerror}") from cause
    return str(file)


def _check_slot(slot: str) -> None:
    if slot not in SLOTS:
        raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
    if slot not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(
            f"there is no skeleton for {slot}, only for {known}; its contract is {SLOTS[slot]}"
        )


def _check_name(slot: str, name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot name a package: use small letters, digits and _, such as my_{slot}"
        )
    if name in installed_registry().names(slot):
        owner = installed_registry().entries[slot, name][0].owner
        raise UserError(
            f"{slot} {name!r} is offered by {owner.distribution} already; choose another name"
        )
    if name in RESERVED:
        why = (
            "is what other files and folders of a project are called, so it cannot name the package"
        )
        raise UserError(f"{name!r} {why}; use another one, such as my_{slot}")
    if name in sys.stdlib_module_names or _importable(name):
        raise UserError(
            f"there is a Python package {name!r} already, which yours would hide; choose another name"
        )


def _importable(name: str) -> bool:
    """Whether Python finds code under a name; a folder without code does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _words(slot: str, name: str) -> dict[str, str]:
    """What the templates leave open."""
    words = {
        "slot": slot,
        "words": {"ffn": "feed-forward layer"}.get(slot, slot.replace("_", " ")),
        "name": name,
        "cls": _class_name(slot, name),
        "distribution": name.replace("_", "-").rstrip("-"),
        "contracts": contracts.VERSION,
        "contract": SLOTS[slot].replace(":", "."),
        "summary": SUMMARIES[slot],
        "catalog": command_prefix("catalog"),
        "fit": command_prefix("fit"),
    }
    words["recipe"] = Template(RECIPES[slot]).substitute(words)
    return words


def _texts(slot: str, name: str) -> list[tuple[str, str]]:
    """The path and the text of each file."""
    words = _words(slot, name)
    texts = []
    for path, template in FILES.items():
        if template == "test.py.txt" and slot in OWN_TESTS:
            template = f"{slot}_test.py.txt"
        text = _read(Template(template).substitute(words))
        texts.append((Template(path).substitute(words), Template(text).substitute(words)))
    return texts


def _class_name(slot: str, name: str) -> str:
    """The name of the class, `MyRouter` for `my_router`; the slot is added where the module uses that name itself."""
    camel = _camel_case(name)
    if re.search(rf"\b{camel}\b", _read(f"{slot}.py.txt")):
        return f"{camel}{_camel_case(slot)}"
    return camel


def _camel_case(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _read(template: str) -> str:
    """The text of a file in `skeletons/`."""
    file = resources.files("core.authoring").joinpath("skeletons", template)
    return file.read_text(encoding="utf-8")
