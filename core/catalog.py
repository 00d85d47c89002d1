"""python -m core.catalog: every plugin that is installed, whether it works, and what its section may say."""

import argparse
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

from core.door import print_json, run_door

WIDTH = 100


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.catalog",
        description="List the installed plugins.",
        epilog="MOELOOM_DISABLE_PLUGINS=a,b skips plugins, by entry point or distribution; MOELOOM_STRICT_PLUGINS=1 "
        "makes a broken one an error, and in the list a broken component too; MOELOOM_TRACE_PLUGINS=1 tells what is "
        "imported, from where, in how long.",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser("show", help="one component: contract, keys with defaults, paper, an example section")
    one.add_argument("slot", metavar="SLOT")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--json", action="store_true", dest="json_after", help="print one JSON document")
    new = commands.add_parser("new", help="write the package of a plugin of your own, with a component that works")
    new.add_argument("slot", metavar="SLOT", help="which part it is: router, balancer, attention, ...")
    new.add_argument("name", metavar="NAME", help="its name in recipes, and the package's")
    new.add_argument("folder", metavar="DIR", help="where the package is written; new, or empty")
    return p


def main(arguments: argparse.Namespace) -> None:
    """The list, one component, or a new package."""
    as_json = arguments.json or getattr(arguments, "json_after", False)
    if arguments.command == "show":
        from core.authoring.catalog import component

        warnings.filterwarnings("ignore", r"plugin .* is broken", module=r"core\.extension\.")  # told to who misses it
        document = component(arguments.slot, arguments.name)
        print_json(document) if as_json else print("\n".join(_page(document)))
    elif arguments.command == "new":
        from core.authoring.skeleton import write_skeleton

        files = write_skeleton(arguments.slot, arguments.name, arguments.folder)
        if as_json:
            print_json({"folder": arguments.folder, "files": files})
        else:
            print("\n".join(files))
            print(f"next: cd {arguments.folder}; README.md says how to test it and train with it")
    else:
        from core.authoring.catalog import check_strict, rows

        found = rows()
        print_json(found) if as_json else _table(found)
        check_strict(found)


def _table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from core.authoring.catalog import shared_names

    table = Table("slot", "name", "distribution", "version", "status")
    for row in found:
        status = row["status"].partition(":")[0]
        table.add_row(row["slot"], row["name"], row["distribution"], row["version"], status)
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False).print(table)
    for row in found:
        if row["status"].startswith("broken"):
            who = f"{row['name']} of {row['distribution']} is " if row["slot"] == "?" else ""
            print(*_wrapped(f"{who}{row['status']}"), sep="\n")
    for (slot, name), owners in shared_names(found).items():
        written = " or ".join(f"{owner}/{name}" for owner in owners)
        print(*_wrapped(f"{slot} {name} has {len(owners)} owners: a recipe must write {written}"), sep="\n")
    for row in found:
        if row["notice"]:
            print(*_wrapped(f"note: {row['notice']}"), sep="\n")


def _page(document: dict[str, Any]) -> Iterator[str]:
    """What `show` prints, line by line."""
    import yaml

    yield from _wrapped("{slot} {name}  ({distribution} {version}, {module})".format_map(document))
    yield ""
    yield from _text(document["doc"].rstrip())
    for key, word in (("paper", "source"), ("notice", "note")):
        if document[key]:
            yield from _wrapped(f"{word}: {document[key]}")
    words = document["capability_docs"]
    told = f"a {document['slot']} that" if any(words.values()) else ""
    yield f"capabilities: {told if words else 'none declared'}".rstrip()
    for word, meaning in words.items():
        yield from _wrapped(f"  {word}: {meaning}" if meaning else f"  {word}", "      ")
    yield "\nkeys:" if document["schema"] else "\nkeys: none"
    yield from _keys(document["schema"], "  ")
    for key, why in document["refuses"].items():
        yield from _wrapped(f"  no {key}: {why}", "      ")
    example = f"{document['slot']}: {_yaml(document['example'])}"
    if len(example) > WIDTH:
        layered = {document["slot"]: document["example"]}
        example = yaml.safe_dump(layered, default_flow_style=None, sort_keys=False, width=WIDTH).strip()
    yield f"\nexample:\n{example}"
    yield f"\ncontract ({document['contract']}):"
    yield from _text(document["contract_doc"].rstrip())


def _keys(schema: dict[str, Any], indent: str) -> Iterator[str]:
    for key, field in schema.items():
        default = "required" if field["required"] else f"default {_yaml(field['default'])}"
        yield f"{indent}{key}: {field['type']}  [{default}]"
        yield from _wrapped(f"{indent}    {field['doc']}", f"{indent}    ")
        yield from _keys(field["keys"], f"{indent}    ")


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _wrapped(line: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _text(text: str) -> Iterator[str]:
    """A docstring; paragraphs and entries of an `Args:` list that are too wide are filled anew."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        entry = re.match(r"\s+\w+(, \w+)*: ", line)
        if block and (not line.strip() or entry or _indent(line) < _indent(block[0])):
            yield from block if max(map(len, block)) <= WIDTH else _filled(block)
            block = []
        if line.strip():
            block.append(line)
        else:
            yield ""


def _filled(block: list[str]) -> list[str]:
    text = " ".join(line.strip() for line in block)
    first, later = (" " * _indent(line) for line in (block[0], block[min(1, len(block) - 1)]))
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


if __name__ == "__main__":
    run_door(main, parser())
