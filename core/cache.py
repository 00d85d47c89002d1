"""python -m core.cache: list the prepared data, or remove some."""

import argparse

from core.command import print_json, run_command


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.cache",
        description="List the prepared data, or remove some.",
        epilog="MOELOOM_CACHE names the folder. What is removed is prepared again when a run needs it.",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    commands = p.add_subparsers(dest="command", metavar="COMMAND")
    remove = commands.add_parser("remove", help="remove entries")
    remove.add_argument(
        "names", nargs="*", metavar="NAME", help="entries, by the beginning of their names"
    )
    remove.add_argument("--all", action="store_true", help="all entries")
    remove.add_argument(
        "--older-than",
        type=float,
        metavar="DAYS",
        help="entries that no run has opened for so long",
    )
    remove.add_argument(
        "--json", action="store_true", dest="json_after", help="print one JSON document"
    )
    return p


def main(arguments: argparse.Namespace) -> None:
    """Prints the entries, or removes those that the arguments name."""
    from core.contracts.errors import UserError
    from core.data.cache import cache_folder
    from core.data.cache_listing import choose, entries_in, remove

    folder = cache_folder()
    entries = entries_in(folder)
    as_json = arguments.json or getattr(arguments, "json_after", False)
    title = "prepared data"
    if arguments.command == "remove":
        given = [bool(arguments.names), arguments.all, arguments.older_than is not None]
        if sum(given) != 1:
            raise UserError("remove: give one of NAME, --all, --older-than DAYS")
        entries = choose(entries, arguments.names, arguments.older_than)
        title = "removed"
        for entry in entries:
            remove(entry)
    if as_json:
        print_json({"folder": str(folder), "entries": [entry.to_dict() for entry in entries]})
        return
    total = sum(entry.bytes for entry in entries)
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    print(f"{title}: {count}, {total / 1e6:,.1f} MB in {folder}")
    for entry in entries:
        tokens = (
            "     not finished"
            if entry.train_tokens is None
            else f"{entry.train_tokens:10,} tokens"
        )
        print(
            f"  {entry.name[:12]}  {entry.bytes / 1e6:9,.1f} MB  {tokens}  "
            f"opened {entry.days:.1f} days ago"
        )


if __name__ == "__main__":
    run_command(main, parser())
