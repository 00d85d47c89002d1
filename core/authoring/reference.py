"""The pages of docs/reference: one for each slot, from the contracts' own source and the built-in components.

`python -m core.authoring.reference docs/reference` writes them, and a test compares. Signatures are printed as they
are written, so the pages do not depend on which Python writes them.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from core import contracts
from core.authoring.catalog import plain, schema_of
from core.extension.hookspec import GROUP, Hooks, Registrar
from core.extension.loader import OWN, find_plugins, load_plugins
from core.extension.registry import SLOTS, Entry, Registry

SHARED = ("component", "schema", "build", "context", "record", "layer", "schedule", "errors")
"""Modules of `core.contracts` that belong to no slot."""

HEADINGS = ("Args:", "Returns:", "Raises:", "Class attributes:")
"""Lines of a docstring under which a list stands."""

COMMAND = "python -m core.authoring.reference docs/reference"

LINE = 120
"""Characters of a line of code."""


def pages() -> dict[str, str]:
    """Every page by its file name."""
    found = {f"{slot}.md": _slot_page(slot) for slot in SLOTS}
    return {"README.md": _index(), "shared.md": _shared_page(), **found}


def write(folder: Path) -> None:
    """Write the pages; those that are no longer made are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for file in folder.glob("*.md"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def _index() -> str:
    rows = [f"| [`{slot}`]({slot}.md) | `{SLOTS[slot].replace(':', '.')}` | {_first(slot)} |" for slot in SLOTS]
    hooks = [_function(node, 3) for node in _class(_tree(Hooks.__module__), Hooks.__name__).body if _is_method(node)]
    lines = [
        "# Reference",
        f"One page for each slot, made from the contracts and the built-in components by `{COMMAND}`;",
        f"edit the docstrings, not the pages. The contracts are version {contracts.VERSION}:",
        "[stability.md](../stability.md) says what that promises, [plugins.md](../plugins.md) how a plugin is written,",
        "and [shared.md](shared.md) what all components have and are told.",
        "",
        "| slot | contract | in a sentence |\n|---|---|---|",
        *rows,
        "",
        "## The hook",
        f"An entry point of the group `{GROUP}` names a module that implements it, and states `CONTRACTS` beside it.",
        "",
        *hooks,
        "## The registry",
        *_definition(_class(_tree(Registrar.__module__), Registrar.__name__), 3),
    ]
    return _page(lines)


def _first(slot: str) -> str:
    module, _, name = SLOTS[slot].partition(":")
    doc = ast.get_docstring(_class(_tree(module), name)) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def _shared_page() -> str:
    lines = ["# What all slots share", f"Made by `{COMMAND}`.", ""]
    for name in SHARED:
        lines += [f"## core.contracts.{name}", *_docstring(_tree(f"core.contracts.{name}")), ""]
        lines += _module(f"core.contracts.{name}", 3)
    return _page(lines)


def _slot_page(slot: str) -> str:
    module, _, name = SLOTS[slot].partition(":")
    also = "What every component has, and the types that are not explained here, are in [shared.md](shared.md)."
    lines = [f"# {slot}", f"Made by `{COMMAND}`. Contract: `{module}.{name}`.", also, ""]
    lines += _definition(_class(_tree(module), name), 2)
    if module != "core.contracts.training":
        lines += _module(module, 2, without=name)
    if words := getattr(importlib.import_module(module), "CAPABILITIES", {}):
        lines += ["## Capabilities", f"A {slot} that declares a word", "", "| word | says that it |\n|---|---|"]
        lines += [f"| `{word}` | {text} |" for word, text in words.items()] + [""]
    lines += ["## Built-in components", ""]
    entries = [e for (s, _), offers in sorted(_own().entries.items()) if s == slot for e in offers]
    for entry in entries:
        lines += _component(entry)
    return _page(lines if entries else [*lines, "None."])


@cache
def _own() -> Registry:
    return load_plugins(owner for owner in find_plugins() if owner.distribution == OWN)


def _component(entry: Entry) -> Iterator[str]:
    loaded, _ = entry.load()
    yield f"### {entry.name}"
    yield f"`{entry.target}`\n"
    yield f"{inspect.getdoc(loaded)}\n"
    for name in ("paper", "notice"):
        if getattr(loaded, name):
            yield f"{name.capitalize()}: {getattr(loaded, name)}\n"
    for name in ("capabilities", "needs"):
        if words := sorted(getattr(loaded, name, ())):
            yield f"{name.capitalize()}: {', '.join(f'`{word}`' for word in words)}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|" if schema_of(loaded.Config) else "It has no keys."
    yield from _rows(schema_of(loaded.Config))
    yield ""
    if loaded.refuses:
        yield "Refused, with the reason:\n"
        yield from [f"- `{key}`: {why}" for key, why in loaded.refuses.items()]
        yield ""
    section = yaml.safe_dump(plain(loaded.example), default_flow_style=True, sort_keys=False, width=10**6).strip()
    yield f"```yaml\n{entry.slot}: {section}\n```\n"


def _rows(schema: dict[str, dict[str, Any]], path: str = "") -> Iterator[str]:
    for key, field in schema.items():
        default = yaml.safe_dump(field["default"], default_flow_style=True, sort_keys=False, width=10**6)
        told = "required" if field["required"] else f"`{default.removesuffix(chr(10)).removesuffix('...').strip()}`"
        cells = [f"`{path}{key}`", f"`{field['type']}`", told, field["doc"]]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield from _rows(field["keys"], f"{path}{key}.")


def _module(module: str, level: int, without: str = "") -> Iterator[str]:
    """Every public class, function and value of a module."""
    body = _tree(module).body
    for index, node in enumerate(body):
        if isinstance(node, ast.ClassDef) and node.name != without and not node.name.startswith("_"):
            yield from _definition(node, level)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield _function(node, level)
        elif name := _assigned(node):
            yield f"{'#' * level} {name}\n\n```python\n{_value(node)}\n```\n\n{_told(body, index)}\n"


def _value(node: ast.stmt) -> str:
    """An assignment in one line; a long table with a line for each entry, as formatters write it."""
    line = _source(node)
    if len(line) <= LINE or not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
        return line
    entries = zip(node.value.keys, node.value.values, strict=True)
    rows = [f"    {_source(key)}: {_source(value)},\n" for key, value in entries if key is not None]
    return f"{_source(node.targets[0])} = {{\n{''.join(rows)}}}"


def _assigned(node: ast.stmt) -> str:
    """The name of a public value, "" for what is none: a type variable, or the words that stand in a table."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) and target.id not in ("CAPABILITIES", "T") else ""


def _told(body: list[ast.stmt], index: int) -> str:
    """The text under a value."""
    after = body[index + 1] if index + 1 < len(body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        return inspect.cleandoc(after.value.value)
    return ""


def _definition(node: ast.ClassDef, level: int) -> Iterator[str]:
    """A class: what it is made from, its docstring, values and methods."""
    yield f"{'#' * level} {node.name}"
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    values = [_source(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    if made:
        yield f"```python\n{node.name}({_arguments(made[0])})\n```\n"
    if values:
        yield "```python\n" + "\n".join(values) + "\n```\n"
    yield from _docstring(node)
    yield ""
    for part in node.body:
        if _is_method(part):
            yield _function(part, level + 1)


def _is_method(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_")


def _function(node: Any, level: int) -> str:
    marks = {_source(mark).replace("cached_property", "property") for mark in node.decorator_list}
    kind = [word for mark, word in (("abstractmethod", "must be written"), ("property", "property")) if mark in marks]
    kind += ["class method"] if "classmethod" in marks else []
    returns = f" -> {_source(node.returns)}" if node.returns else ""
    signature = node.name if "property" in marks else f"{node.name}({_arguments(node)})"
    title = f"{'#' * level} {node.name}" + (f" ({', '.join(kind)})" if kind else "")
    doc = "\n".join(_docstring(node))
    return f"{title}\n```python\n{signature}{returns}\n```\n" + (f"\n{doc}\n" if doc else "")


def _arguments(node: ast.FunctionDef) -> str:
    """A function's arguments as they are written, without `self`."""
    given, keywords = node.args.args, zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    defaults = [None] * (len(given) - len(node.args.defaults)) + list(node.args.defaults)
    parts = [
        _argument(arg, value) for arg, value in zip(given, defaults, strict=True) if arg.arg not in ("self", "cls")
    ]
    if node.args.vararg:
        parts.append(f"*{_source(node.args.vararg)}")
    elif node.args.kwonlyargs:
        parts.append("*")
    parts += [_argument(arg, value) for arg, value in keywords]
    return ", ".join(parts + ([f"**{_source(node.args.kwarg)}"] if node.args.kwarg else []))


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return _source(argument) + (f" = {_source(default)}" if default else "")


def _source(node: ast.AST) -> str:
    """Code in one line, with the quotes that formatters use."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


def _docstring(node: Any) -> Iterator[str]:
    """A docstring as Markdown: what stands under `Args:` and the like becomes a list, other indented lines a block."""
    inside = False
    for line in (ast.get_docstring(node) or "").splitlines():
        text = line.strip()
        inside = line in HEADINGS or (inside and (line.startswith(" ") or not text))
        if line in HEADINGS:
            yield f"{text}\n"
        elif inside and text and not line[4:5].isspace():
            name, colon, rest = text.partition(":")
            yield f"- `{name}`:{rest}" if colon else f"- {text}"
        else:
            yield f"  {text}".rstrip() if inside else line


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _tree(module: str) -> ast.Module:
    source = inspect.getsource(importlib.import_module(module))
    return ast.parse(source)


def _page(lines: list[str]) -> str:
    """The lines as a file, with an empty line under every heading and never two."""
    text = ""
    fenced = False
    for line in "\n".join(lines).splitlines():
        fenced ^= line.startswith("```")
        if line or not text.endswith("\n\n"):
            text += f"{line}\n"
        if line.startswith("#") and not fenced:
            text += "\n"
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
