"""What is imported, from whom and which file, and how long it took: on stderr under `MOELOOM_TRACE_PLUGINS=1`."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from core.contracts.schema import Provenance

_told: set[tuple[str, str, str]] = set()


@contextmanager
def traced(what: str, owner: Provenance, target: str) -> Iterator[None]:
    """Tell of what is imported inside, the first time that it is.

    Args:
        what: a plugin's or a component's name.
        owner: whose it is.
        target: the module, or "module:Class".
    """
    began, fate = time.perf_counter(), ", failed"
    try:
        yield
        fate = ""
    finally:
        milliseconds = 1000 * (time.perf_counter() - began)
        key = (what, owner.distribution, target)
        if os.environ.get("MOELOOM_TRACE_PLUGINS") == "1" and key not in _told:
            _told.add(key)
            module = sys.modules.get(target.partition(":")[0])
            file = getattr(module, "__file__", None) or "no file"
            who = f"{owner.distribution} {owner.version}".strip()
            print(f"trace: {what} of {who}: {target} from {file}, {milliseconds:.1f} ms{fate}", file=sys.stderr)
