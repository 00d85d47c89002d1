"""python -m core.catalog: every plugin that is installed, whether it works, and what its section may say."""

import argparse
from typing import Any

from core.door import print_json, run_door


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(prog="python -m core.catalog", description="List the installed plugins.")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser("show", help="one component: contract, keys with defaults, paper, an example section")
    one.add_argument("slot", metavar="SLOT")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--json", action="store_true", dest="json_after", help="print one JSON document")
    return p


def main(arguments: argparse.Namespace) -> None:
    """The list, or one component."""
    from core.analysis.catalog import component, rows

    as_json = arguments.json or getattr(arguments, "json_after", False)
    if arguments.command == "show":
        document = component(arguments.slot, arguments.name)
        print_json(document) if as_json else _show(document)
        return
    found = rows()
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("slot", "name", "distribution", "version", "module", "status")
    table = Table(*columns)
    for row in found:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)
    for row in found:
        if row["notice"]:
            print(f"note: {row['notice']}")


def _show(document: dict[str, Any]) -> None:
    import yaml

    owner = "{distribution} {version}, {module}".format_map(document)
    print(f"{document['slot']} {document['name']}  ({owner})")
    print(f"\n{document['doc']}\n")
    if document["paper"]:
        print(f"source: {document['paper']}")
    if document["notice"]:
        print(f"note: {document['notice']}\n")
    print(f"capabilities: {', '.join(document['capabilities']) or 'none declared'}\n")
    for key, field in document["schema"].items():
        default = "required" if field["required"] else f"default {field['default']}"
        print(f"  {key}: {field['type']}  [{default}]\n      {field['doc']}")
    print("\nexample:\n" + yaml.safe_dump(document["example"], default_flow_style=True, width=100).strip())
    print(f"\ncontract ({document['contract']}):\n{document['contract_doc']}")


if __name__ == "__main__":
    run_door(main, parser())
