"""What all commands share: one sentence and exit code 2 for a user's mistake, 130 after an interrupt.

This module and every command import nothing heavy before the arguments are read, so that `--help` is quick.
"""

import argparse
import errno
import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from core.contracts.errors import Interrupted, RunFailed, StoppedBySignal, UserError

OUR_FOLDER = Path(__file__).resolve().parents[1]
"""The folder that holds `core` and `plugins`: site-packages, or a checkout."""

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that end a command, beside SIGINT; schedulers send SIGUSR1 and SIGUSR2 as warnings."""

_OF_SYSTEM = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EIO,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    }
)
"""Errors about a path that are the machine's or the user's, and never the program's."""

_OF_MEMORY = ("can't allocate memory", "out of memory")
"""How torch reports that memory is too small."""

_SHOWN = 200
"""Characters of a path in an error message."""

_received: list[int] = []
"""The signals that have ended the command under way."""

_programs: list[str] = []
"""The program's name in usage lines, `moeloom fit` or `python -m core.fit`; empty while no command runs."""


def run_command(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser
) -> None:
    """Parses the arguments, runs the command, and exits with the documented exit code."""
    arguments = _parsed(parser)
    before = _handle_signals()
    try:
        with _started_as(parser.prog), _one_line_warnings(), _without_current_folder():
            _check_rank_variables()
            with _signals_first():
                main(arguments)
    except UserError as error:
        leave(2, str(error))
    except RunFailed as error:
        leave(1, str(error))
    except KeyboardInterrupt as interrupt:
        leave(130, str(interrupt) or "interrupted")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141, "")
    except Interrupted as stopped:
        leave(128 + stopped.signum, str(stopped))
    except Exception as error:
        sentence = system_error(error)
        if sentence:
            leave(2, sentence)
        traceback.print_exc()
        leave(1, "")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _signals_first() -> Iterator[None]:
    """Exits as the signal says where a library has caught `StoppedBySignal` while it was imported, and failed then."""
    _received.clear()
    try:
        yield
    except (Interrupted, RunFailed):
        raise
    except Exception:
        if _received:
            raise StoppedBySignal(_received[0]) from None
        raise


def _check_rank_variables() -> None:
    """Raises `UserError` for a variable that Lightning reads as a number when it is imported, and that is none."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise UserError(
                f"{name} = {value!r} in the environment: must be a whole number, or not set"
            )


def system_error(error: BaseException) -> str | None:
    """A sentence about memory that is too small, or a path that cannot be used; None for any other exception.

    Such errors depend on the machine and not on the program: a name that is too long, a read-only disk, a right that
    is missing, a folder in the place of a file.
    """
    text = " ".join(str(error).split())
    is_memory = any(sign in text for sign in _OF_MEMORY)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_memory):
        how = "try smaller batches (batch.sequences), shorter sequences or a smaller model"
        return f"the memory is too small for a tensor of this run; {how} ({text[:160] or 'Python'})"
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _OF_SYSTEM:
        return None
    path = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
    shown = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
    return f"{shown}: cannot be used: {error.strerror}"


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; options may be mixed with the overrides, unless the parser has subcommands."""
    try:
        return parser.parse_intermixed_args()
    except TypeError:
        return parser.parse_args()


def command_prefix(name: str) -> str:
    """Returns what the user types to run a command.

    Args:
        name: the command's name, such as `report`.

    Returns:
        `moeloom NAME` if the command under way was started so, otherwise `python -m core.NAME`.
    """
    if _programs and _programs[-1].startswith("moeloom "):
        return f"moeloom {name}"
    return f"python -m core.{name}"


def command_line() -> str:
    """Returns the command under way as the user typed it; in another program, its file and arguments."""
    program = _programs[-1] if _programs else shlex.quote(Path(sys.argv[0]).name)
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


@contextmanager
def _started_as(program: str) -> Iterator[None]:
    """Keeps the program's name while its command runs."""
    _programs.append(program)
    try:
        yield
    finally:
        _programs.pop()


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Prints our own warnings in one line, and keeps those about plugins from becoming errors."""
    theirs = warnings.formatwarning

    def ours(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category.__module__.partition(".")[0] == "core":
            return f"moeloom: warning: {' '.join(str(message).split())}\n"
        return theirs(message, category, *where, **line)

    warnings.formatwarning = ours
    try:
        with warnings.catch_warnings():
            actions = [action for action, *_ in warnings.filters]
            if "error" in actions:
                warnings.filterwarnings("default", module=r"core\.extension\.")
            yield
    finally:
        if warnings.formatwarning is ours:
            warnings.formatwarning = theirs


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Leaves the current folder, which `python -m` puts first, out of the module search path of a command.

    Otherwise a module or the metadata of a distribution in a downloaded folder could run in the place of an optional
    package, or as a plugin. In a checkout the folder stays, because `core` is imported from there.
    """
    before = list(sys.path)
    current = Path.cwd()
    if current != OUR_FOLDER and sys.path and Path(sys.path[0]).resolve() == current:
        del sys.path[0]
    try:
        yield
    finally:
        sys.path[:] = before


def search_current_folder() -> None:
    """Lets a command find the modules of the current folder, after all others, because a recipe names some.

    The folder that holds ours is added before it, so that a user's own package `core` or `plugins` cannot hide ours.
    Outside of a command the search path is the caller's own.
    """
    current = os.getcwd()
    if _programs and not {"", current} & set(sys.path):
        sys.path += [str(OUR_FOLDER), current]


def _handle_signals() -> dict[signal.Signals, Any]:
    """Lets signals that would kill this process end it as an exit does; returns the handlers from before.

    A signal that is ignored (`nohup`), or that another program handles, stays so; SIGTERM is always handled.
    """
    before = {}
    for signum in STOPPING:
        if signum == signal.SIGTERM or signal.getsignal(signum) == signal.SIG_DFL:
            before[signum] = signal.signal(signum, terminated)
    return before


def terminated(signum: int, frame: FrameType | None) -> None:
    """Exits at a signal: nothing has to be saved before a run has begun."""
    _received.append(signum)
    raise StoppedBySignal(signum)


def show_cursor() -> None:
    """Shows the cursor of the terminal on stderr, if there is one: a progress bar has hidden it."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")


def leave(code: int, sentence: str) -> None:
    """Prints one sentence on stderr and exits."""
    if sentence:
        print(f"moeloom: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    raise SystemExit(code)


def print_json(document: Any) -> None:
    """Prints the one JSON document of a `--json` run."""
    print(json.dumps(document, indent=2, allow_nan=False))


def trust_argument(parser: argparse.ArgumentParser, what: str = "a run's recipe names") -> None:
    """Adds the flag --trust, without which no file of a run that was made elsewhere may name code."""
    parser.add_argument(
        "--trust", action="store_true", help=f"run code that {what}, though it was not made here"
    )


def weights_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --weights, which takes averaged weights in place of those that were trained."""
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="averaged weights that the run kept, e.g. ema (those that were trained)",
    )


def placement_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --placement, which takes a plan of redundant experts."""
    parser.add_argument(
        "--placement",
        metavar="FILE",
        type=Path,
        help="run on redundant experts, as a plan of core.placement --json says",
    )


def drop_free_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --drop-free."""
    parser.add_argument(
        "--drop-free",
        action="store_true",
        help="carry out every assignment to an expert, where the strategy would drop some in evaluation too",
    )


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments RECIPE and KEY=VALUE."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. optimizer.lr=0.002"
    )
