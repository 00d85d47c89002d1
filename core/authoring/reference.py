"""Writes the pages of docs/reference: one for each slot, from the source of the contracts and the built-in components.

`python -m core.authoring.reference docs/reference` writes them, and a test compares them. Signatures are printed as
they are written in the source, so the pages do not depend on the version of Python.
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
"""Lines of a docstring that are followed by a list."""

KINDS = {
    "abstractmethod": "must be written",
    "property": "property",
    "classmethod": "class method",
}
"""The words for the decorators that a heading names."""

COMMAND = "python -m core.authoring.reference docs/reference"

LINE = 120
"""The most characters in a line of code."""

TABLE = "|---|---|---|"
"""The line under the heading of a table with three columns."""


def pages() -> dict[str, str]:
    """The text of every page by its file name."""
    found = {f"{slot}.md": _slot_page(slot) for slot in SLOTS}
    return {"README.md": _index(), "shared.md": _shared_page(), **found}


def write(folder: Path) -> None:
    """Writes the pages into a folder, and removes all other Markdown files from it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages()
    for file in folder.glob("*.md"):
        if file.name not in made:
            file.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")


def _index() -> str:
    """The page README.md: all slots, the hooks and the registry."""
    rows = []
    for slot, target in SLOTS.items():
        contract = target.replace(":", ".")
        rows.append(f"| [`{slot}`]({slot}.md) | `{contract}` | {_summary(slot)} |")
    hooks = _class(_tree(Hooks.__module__), Hooks.__name__)
    registry = _class(_tree(Registrar.__module__), Registrar.__name__)
    lines = [
        "# Reference",
        f"One page for each slot, made from the contracts and the built-in components by `{COMMAND}`;",
        f"edit the docstrings, not the pages. The contracts are version {contracts.VERSION}:",
        "[stability.md](../stability.md) says what that promises, [plugins.md](../plugins.md) how a plugin is written,",
        "and [shared.md](shared.md) what all components have and are given.",
        "",
        f"| slot | contract | in a sentence |\n{TABLE}",
        *rows,
        "",
        "## The hook",
        f"An entry point of the group `{GROUP}` names a module that implements it, and states `CONTRACTS` beside it.",
        "",
        *_methods(hooks, 3),
        "## The registry",
        *_definition(registry, 3),
    ]
    return _page(lines)


def _summary(slot: str) -> str:
    """The first paragraph of the docstring of a slot's contract, in one line."""
    module, _, name = SLOTS[slot].partition(":")
    doc = ast.get_docstring(_class(_tree(module), name)) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def _shared_page() -> str:
    """The page of the modules that belong to no slot."""
    lines = ["# What all slots share", f"Made by `{COMMAND}`.", ""]
    for name in SHARED:
        module = f"core.contracts.{name}"
        lines += [f"## {module}", *_docstring(_tree(module)), "", *_module(module, 3)]
    return _page(lines)


def _slot_page(slot: str) -> str:
    """The page of one slot: its contract, the capabilities, and the built-in components."""
    module, _, name = SLOTS[slot].partition(":")
    also = "What every component has, and the types that are not explained here, are in [shared.md](shared.md)."
    lines = [f"# {slot}", f"Made by `{COMMAND}`. Contract: `{module}.{name}`.", also, ""]
    lines += _definition(_class(_tree(module), name), 2)
    if module != "core.contracts.training":
        lines += _module(module, 2, without=name)
    lines += _capabilities(slot, getattr(importlib.import_module(module), "CAPABILITIES", {}))
    lines += ["## Built-in components", ""]
    entries = _entries_of(slot)
    for entry in entries:
        lines += _component(entry)
    if not entries:
        lines.append("None.")
    return _page(lines)


def _capabilities(slot: str, words: dict[str, str]) -> Iterator[str]:
    """The table of the capabilities that a slot's contract lists; nothing if it lists none."""
    if words:
        yield "## Capabilities"
        yield f"A {slot} that declares a word"
        yield ""
        yield "| word | says that it |\n|---|---|"
        for word, text in words.items():
            yield f"| `{word}` | {text} |"
        yield ""


def _entries_of(slot: str) -> list[Entry]:
    """The built-in components of a slot, sorted by name."""
    found: list[Entry] = []
    for (offered, _), offers in sorted(_built_in().entries.items()):
        if offered == slot:
            found += offers
    return found


@cache
def _built_in() -> Registry:
    return load_plugins(owner for owner in find_plugins() if owner.distribution == OWN)


def _component(entry: Entry) -> Iterator[str]:
    """The section of one component."""
    loaded, _ = entry.load()
    yield f"### {entry.name}"
    yield f"`{entry.target}`\n"
    yield f"{inspect.getdoc(loaded)}\n"
    for name in ("paper", "caveat"):
        if getattr(loaded, name):
            yield f"{name.capitalize()}: {getattr(loaded, name)}\n"
    for name in ("capabilities", "needs"):
        words = sorted(getattr(loaded, name, ()))
        if words:
            yield f"{name.capitalize()}: {', '.join(f'`{word}`' for word in words)}\n"
    schema = schema_of(loaded.Config)
    if schema:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from _rows(schema)
    else:
        yield "It has no keys."
    yield ""
    if loaded.rejected_keys:
        yield "Keys of other methods that are not allowed here, with the reason:\n"
        for key, reason in loaded.rejected_keys.items():
            yield f"- `{key}`: {reason}"
        yield ""
    yield f"```yaml\n{entry.slot}: {_yaml(plain(loaded.example)).strip()}\n```\n"


def _rows(schema: dict[str, dict[str, Any]], path: str = "") -> Iterator[str]:
    """A row of a table for each key of a section, and for the keys below it; `path` comes before their names."""
    for key, field in schema.items():
        default = "required"
        if not field["required"]:
            written = _yaml(field["default"]).removesuffix("\n").removesuffix("...").strip()
            default = f"`{written}`"
        cells = [f"`{path}{key}`", f"`{field['type']}`", default, field["doc"]]
        escaped = [cell.replace("|", "\\|") for cell in cells]
        yield f"| {' | '.join(escaped)} |"
        yield from _rows(field["keys"], f"{path}{key}.")


def _yaml(value: Any) -> str:
    """The value as YAML in one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6))


def _module(module: str, level: int, without: str = "") -> Iterator[str]:
    """The public classes, functions and values of a module, without the class of the given name."""
    body = _tree(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef) and _is_public(node):
            if node.name != without:
                yield from _definition(node, level)
        elif isinstance(node, ast.FunctionDef) and _is_public(node):
            yield _function(node, level)
        elif name := _assigned(node):
            heading = "#" * level
            yield f"{heading} {name}\n\n```python\n{_value(node)}\n```\n\n{_text_of(after)}\n"


def _is_public(node: ast.ClassDef | ast.FunctionDef) -> bool:
    return not node.name.startswith("_")


def _value(node: ast.stmt) -> str:
    """An assignment in one line; a long dictionary with a line for each entry, as formatters write it."""
    line = _source(node)
    if len(line) <= LINE or not isinstance(node, ast.Assign):
        return line
    if not isinstance(node.value, ast.Dict):
        return line
    rows = []
    for key, value in zip(node.value.keys, node.value.values, strict=True):
        if key is not None:
            rows.append(f"    {_source(key)}: {_source(value)},\n")
    return f"{_source(node.targets[0])} = {{\n{''.join(rows)}}}"


def _assigned(node: ast.stmt) -> str:
    """The name of a public value; "" for a type variable, and for the capabilities, which have a table."""
    if not isinstance(node, ast.Assign):
        return ""
    target = node.targets[0]
    if isinstance(target, ast.Name) and target.id not in ("CAPABILITIES", "T"):
        return target.id
    return ""


def _text_of(node: ast.stmt | None) -> str:
    """The text of a statement that is only a string, such as the explanation below a value; "" for any other."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return ""
    if isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""


def _definition(node: ast.ClassDef, level: int) -> Iterator[str]:
    """A class: the arguments of its constructor, its annotated values, its docstring and its public methods."""
    yield f"{'#' * level} {node.name}"
    values = []
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            yield f"```python\n{node.name}({_arguments(part)})\n```\n"
        elif isinstance(part, ast.AnnAssign):
            values.append(_source(part))
    if values:
        yield "```python\n" + "\n".join(values) + "\n```\n"
    yield from _docstring(node)
    yield ""
    yield from _methods(node, level + 1)


def _methods(node: ast.ClassDef, level: int) -> Iterator[str]:
    """The public methods and properties that a class itself defines."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and _is_public(part):
            yield _function(part, level)


def _function(node: ast.FunctionDef, level: int) -> str:
    """A function, method or property: a heading with its kind, its signature and its docstring."""
    marks = {_source(mark).replace("cached_property", "property") for mark in node.decorator_list}
    kinds = [words for mark, words in KINDS.items() if mark in marks]
    title = f"{'#' * level} {node.name}"
    if kinds:
        title += f" ({', '.join(kinds)})"
    signature = node.name
    if "property" not in marks:
        signature += f"({_arguments(node)})"
    if node.returns:
        signature += f" -> {_source(node.returns)}"
    text = f"{title}\n```python\n{signature}\n```\n"
    doc = "\n".join(_docstring(node))
    if doc:
        text += f"\n{doc}\n"
    return text


def _arguments(node: ast.FunctionDef) -> str:
    """The arguments of a function as they are written, without `self` and `cls`."""
    positional = node.args.args
    without_default = len(positional) - len(node.args.defaults)
    defaults = [None] * without_default + list(node.args.defaults)
    parts = []
    for argument, default in zip(positional, defaults, strict=True):
        if argument.arg not in ("self", "cls"):
            parts.append(_argument(argument, default))
    if node.args.vararg:
        parts.append(f"*{_source(node.args.vararg)}")
    elif node.args.kwonlyargs:
        parts.append("*")
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        parts.append(_argument(argument, default))
    if node.args.kwarg:
        parts.append(f"**{_source(node.args.kwarg)}")
    return ", ".join(parts)


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default:
        return f"{_source(argument)} = {_source(default)}"
    return _source(argument)


def _source(node: ast.AST) -> str:
    """The code of a node in one line, with the quotes that formatters use."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node))


def _docstring(node: Any) -> Iterator[str]:
    """A docstring as lines of Markdown: entries under one of `HEADINGS` become a list, their further lines indented."""
    inside = False
    for line in (ast.get_docstring(node) or "").splitlines():
        text = line.strip()
        inside = line in HEADINGS or (inside and (line.startswith(" ") or not text))
        if line in HEADINGS:
            yield f"{text}\n"
        elif inside and text and not line[4:5].isspace():
            name, colon, rest = text.partition(":")
            yield f"- `{name}`:{rest}" if colon else f"- {text}"
        elif inside:
            yield f"  {text}".rstrip()
        else:
            yield line


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    """The class of that name in a module."""
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    source = inspect.getsource(importlib.import_module(module))
    return ast.parse(source)


def _page(lines: list[str]) -> str:
    """The lines as the text of a file, with an empty line below every heading, and never two together."""
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
