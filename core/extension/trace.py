"""Prints on stderr which plugin modules are imported, from which file, in how long (`MOELOOM_TRACE_PLUGINS=1`)."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from core.contracts.schema import Provenance

_printed: set[tuple[str, str, str]] = set()


@contextmanager
def traced(what: str, owner: Provenance, target: str) -> Iterator[None]:
    """Prints a line about what is imported inside this context, the first time that it is.

    Args:
        what: a plugin's or a component's name.
        owner: the plugin that it belongs to.
        target: the module, or "module:Class".
    """
    began = time.perf_counter()
    outcome = ", failed"
    try:
        yield
        outcome = ""
    finally:
        milliseconds = 1000 * (time.perf_counter() - began)
        key = (what, owner.distribution, target)
        if os.environ.get("MOELOOM_TRACE_PLUGINS") == "1" and key not in _printed:
            _printed.add(key)
            module = sys.modules.get(target.partition(":")[0])
            file = getattr(module, "__file__", None) or "no file"
            who = f"{owner.distribution} {owner.version}".strip()
            print(
                f"trace: {what} of {who}: {target} from {file}, {milliseconds:.1f} ms{outcome}",
                file=sys.stderr,
            )
