"""The command `moeloom`, and `python -m moeloom`."""

import sys

from moeloom.search_path import check_packages, leave_out_current_folder


def main() -> None:
    """Runs the command that the command line names, with the packages that belong to this one."""
    leave_out_current_folder()
    try:
        check_packages()
    except ImportError as error:
        print(f"moeloom: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from moeloom.commands import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
