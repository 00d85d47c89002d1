"""A plugin package to begin with: the files that `python -m core.catalog new` writes, made from `skeletons/`."""

import importlib.util
import keyword
import re
import sys
from importlib import resources
from pathlib import Path
from string import Template

from core import contracts
from core.contracts.errors import UserError, nearest
from core.extension.loader import installed_registry
from core.extension.registry import SLOTS

SUMMARIES = {
    "router": "softmax affinities, the best K of them.",
    "balancer": "a loss on how often experts are chosen, times how much affinity they get.",
    "attention": "causal attention with a single head.",
    "ffn": "two matrices with a ReLU between them.",
    "loss_head": "next-token prediction with smoothed labels.",
    "precision": "everything in fp32.",
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
}
FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "$name.yaml": "recipe.yaml.txt",
    "$name/__init__.py": "init.py.txt",
    "$name/$slot.py": "$slot.py.txt",
    "tests/test_$name.py": "test.py.txt",
}
"""What is written, and the text it is made from."""
RESERVED = frozenset(
    ["build", "conftest", "data", "dist", "doc", "docs", "env", "examples", "moeloom", "runs", "setup", "src", "tests"]
)
"""What folders beside a package are called, or files that Python and pytest read, and our own distribution."""


def write_skeleton(slot: str, name: str, folder: str | Path) -> list[str]:
    """Write the package of a plugin with one component, which works.

    Args:
        slot: what kind of component.
        name: its name in recipes; the package and its entry point are called the same.
        folder: where to; it must not exist, or be empty.

    Returns:
        The files, relative to the folder.

    Raises:
        UserError: there is no such slot, or no skeleton for it; the name is no package's name or is taken; the
            folder holds something, or cannot be written.
    """
    _check_slot(slot)
    _check_name(slot, name)
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is there already and is no empty folder; name another one")
    texts = dict(_texts(slot, name))
    try:
        for path, text in texts.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
    except OSError as cause:
        raise UserError(f"{root} cannot be written: {cause.strerror}") from cause
    return list(texts)


def _check_slot(slot: str) -> None:
    if slot not in SLOTS:
        raise UserError(f"there is no slot {slot!r}; {nearest(slot, SLOTS)}")
    if slot not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"there is no skeleton for {slot}, only for {known}; its contract is {SLOTS[slot]}")


def _check_name(slot: str, name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} cannot name a package: use small letters, digits and _, such as my_{slot}")
    if name in installed_registry().names(slot):
        owner = installed_registry().entries[slot, name][0].owner
        raise UserError(f"{slot} {name!r} is offered by {owner.distribution} already; choose another name")
    if name in RESERVED:
        why = "is what other files and folders of a project are called, so it cannot name the package"
        raise UserError(f"{name!r} {why}; use another one, such as my_{slot}")
    if name in sys.stdlib_module_names or _importable(name):
        raise UserError(f"there is a Python package {name!r} already, which yours would hide; choose another name")


def _importable(name: str) -> bool:
    """Whether there is code under a name; a folder without any does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _texts(slot: str, name: str) -> list[tuple[str, str]]:
    words = {
        "slot": slot,
        "words": {"ffn": "feed-forward layer"}.get(slot, slot.replace("_", " ")),
        "name": name,
        "cls": _class_name(slot, name),
        "distribution": name.replace("_", "-").rstrip("-"),
        "contracts": contracts.VERSION,
        "contract": SLOTS[slot].replace(":", "."),
        "summary": SUMMARIES[slot],
    }
    words["recipe"] = Template(RECIPES[slot]).substitute(words)
    named = {path: _read(Template(text).substitute(words)) for path, text in FILES.items()}
    return [(Template(path).substitute(words), Template(text).substitute(words)) for path, text in named.items()]


def _class_name(slot: str, name: str) -> str:
    """`my_router` as MyRouter; a name that the module needs for something else gets its slot's behind it."""
    camel, kind = ("".join(part.capitalize() for part in text.split("_")) for text in (name, slot))
    return f"{camel}{kind}" if re.search(rf"\b{camel}\b", _read(f"{slot}.py.txt")) else camel


def _read(text: str) -> str:
    return resources.files("core.authoring").joinpath("skeletons", text).read_text(encoding="utf-8")
