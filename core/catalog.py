"""python -m core.catalog: list the installed plugins, show the keys of one component, or write a new plugin."""

import argparse
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.command import print_json, run_command

WIDTH = 100


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.catalog",
        description="List the installed plugins.",
        epilog="MOELOOM_DISABLE_PLUGINS=a,b skips plugins, by entry point or distribution; MOELOOM_STRICT_PLUGINS=1 "
        "makes a broken one an error, and in the list a broken component too; MOELOOM_TRACE_PLUGINS=1 prints what is "
        "imported, from where, in how long.",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="list this module or file (./my_router.py) too, as a recipe's `plugins` does; may be given several times",
    )
    commands = p.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser(
        "show", help="one component: contract, keys with defaults, paper, an example section"
    )
    one.add_argument("slot", metavar="SLOT")
    one.add_argument("name", metavar="NAME")
    one.add_argument(
        "--json", action="store_true", dest="json_after", help="print one JSON document"
    )
    new = commands.add_parser(
        "new", help="write the package of a plugin of your own, with a component that works"
    )
    new.add_argument(
        "slot", metavar="SLOT", help="which part it is: router, balancer, attention, ..."
    )
    new.add_argument("name", metavar="NAME", help="its name in recipes, and the package's")
    new.add_argument(
        "folder",
        metavar="DIR",
        help="where the package is written; new, or empty. A name like my_router.py writes one file instead",
    )
    return p


def main(arguments: argparse.Namespace) -> None:
    """Prints the list or one component, or writes a new package."""
    from core.contracts.errors import UserError

    as_json = arguments.json or getattr(arguments, "json_after", False)
    try:
        _run(arguments, as_json=as_json)
    except UserError as cause:
        if not arguments.plugin:
            raise
        raise UserError(
            str(cause).replace("which the recipe names", "which --plugin names")
        ) from cause


def _run(arguments: argparse.Namespace, *, as_json: bool) -> None:
    if arguments.command == "show":
        _show(arguments.slot, arguments.name, _named(arguments), as_json=as_json)
    elif arguments.command == "new":
        _write_new(arguments.slot, arguments.name, arguments.folder, as_json=as_json)
    else:
        _list(_named(arguments), as_json=as_json)


def _named(arguments: argparse.Namespace) -> list[str]:
    """The modules and files that `--plugin` names, files by their whole paths."""
    from core.command import search_current_folder
    from core.extension.plugin_file import is_plugin_file

    if not all(map(is_plugin_file, arguments.plugin)):
        search_current_folder()
    return [os.path.abspath(name) if is_plugin_file(name) else name for name in arguments.plugin]


def _show(slot: str, name: str, named: list[str], *, as_json: bool) -> None:
    from core.authoring.catalog import component

    # the error about a name that nobody offers lists broken plugins, so no warning is needed
    warnings.filterwarnings("ignore", r"plugin .* is broken", module=r"core\.extension\.")
    document = component(slot, name, named)
    if as_json:
        print_json(document)
    else:
        print("\n".join(_page(document)))


def _write_new(slot: str, name: str, folder: str, *, as_json: bool) -> None:
    from core.authoring.skeleton import write_skeleton
    from core.extension.plugin_file import is_plugin_file

    files = write_skeleton(slot, name, folder)
    if as_json:
        print_json({"folder": folder, "files": files})
    else:
        print("\n".join(files))
        if is_plugin_file(folder):
            print(f"next: put `plugins: [./{Path(folder).name}]` into a recipe beside it")
        else:
            print(f"next: cd {folder}; README.md says how to test it and train with it")


def _list(named: list[str], *, as_json: bool) -> None:
    from core.authoring.catalog import catalog_rows, check_strict

    found = catalog_rows(named)
    if as_json:
        print_json(found)
    else:
        _print_table(found)
    check_strict(found)


def _print_table(found: list[dict[str, Any]]) -> None:
    """Prints the list, then whole sentences about broken rows, shared names and caveats."""
    from rich.console import Console
    from rich.table import Table

    from core.authoring.catalog import shared_names

    table = Table("slot", "name", "distribution", "version", "status")
    for row in found:
        status = row["status"].partition(":")[0]
        table.add_row(row["slot"], row["name"], row["distribution"], row["version"], status)
    width = None if sys.stdout.isatty() else WIDTH
    Console(width=width, markup=False, highlight=False).print(table)
    for row in found:
        if not row["status"].startswith("broken"):
            continue
        sentence = row["status"]
        if row["slot"] == "?":
            sentence = f"{row['name']} of {row['distribution']} is {sentence}"
        _print_wrapped(sentence)
    for (slot, name), owners in shared_names(found).items():
        written = " or ".join(f"{owner}/{name}" for owner in owners)
        _print_wrapped(f"{slot} {name} has {len(owners)} owners: a recipe must write {written}")
    for row in found:
        if row["notice"]:
            _print_wrapped(f"note: {row['notice']}")


def _page(document: dict[str, Any]) -> Iterator[str]:
    """Yields the lines that `show` prints."""
    import yaml

    yield from _wrapped("{slot} {name}  ({distribution} {version}, {module})".format_map(document))
    yield ""
    yield from _text(document["doc"].rstrip())
    for key, word in (("paper", "source"), ("notice", "note")):
        if document[key]:
            yield from _wrapped(f"{word}: {document[key]}")
    yield from _capabilities(document["slot"], document["capability_docs"])
    yield "\nkeys:" if document["schema"] else "\nkeys: none"
    yield from _keys(document["schema"], "  ")
    for key, why in document["refuses"].items():
        yield from _wrapped(f"  no {key}: {why}", "      ")
    example = f"{document['slot']}: {_yaml(document['example'])}"
    width = WIDTH
    while (
        max(map(len, example.splitlines())) > WIDTH
    ):  # YAML breaks a line after it has become too long
        layered = {document["slot"]: document["example"]}
        example = yaml.safe_dump(layered, default_flow_style=None, sort_keys=False, width=width)
        example = example.strip()
        width -= 4
    yield f"\nexample:\n{example}"
    yield f"\ncontract ({document['contract']}):"
    yield from _text(document["contract_doc"].rstrip())


def _capabilities(slot: str, meanings: dict[str, str]) -> Iterator[str]:
    """Yields the declared capabilities, with their meanings where the slot explains them."""
    if not meanings:
        yield "capabilities: none declared"
        return
    explained = any(meanings.values())
    yield f"capabilities: a {slot} that" if explained else "capabilities:"
    for word, meaning in meanings.items():
        line = f"  {word}: {meaning}" if meaning else f"  {word}"
        yield from _wrapped(line, "      ")


def _keys(schema: dict[str, Any], indent: str) -> Iterator[str]:
    """Yields the keys of a section with types, defaults and meanings, nested sections indented."""
    for key, field in schema.items():
        default = "required"
        if not field["required"]:
            default = f"default {_yaml(field['default'])}"
        yield f"{indent}{key}: {field['type']}  [{default}]"
        yield from _wrapped(f"{indent}    {field['doc']}", f"{indent}    ")
        yield from _keys(field["keys"], f"{indent}    ")


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _print_wrapped(sentence: str) -> None:
    print("\n".join(_wrapped(sentence)))


def _wrapped(line: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _text(text: str) -> Iterator[str]:
    """Yields the lines of a docstring; paragraphs and `Args:` entries that are too wide are filled anew."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        entry = re.match(r"\s+\w+(, \w+)*: ", line)
        if block and (not line.strip() or entry or _indent(line) < _indent(block[0])):
            too_wide = max(map(len, block)) > WIDTH
            yield from _filled(block) if too_wide else block
            block = []
        if line.strip():
            block.append(line)
        else:
            yield ""


def _filled(block: list[str]) -> list[str]:
    text = " ".join(line.strip() for line in block)
    second = block[1] if len(block) > 1 else block[0]
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * _indent(block[0]),
        subsequent_indent=" " * _indent(second),
        break_on_hyphens=False,
    )


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


if __name__ == "__main__":
    run_command(main, parser())
