"""Our training steps and the limit in a process of their own, in which freed memory is kept as `core.fit` keeps it.

The setting holds for a whole process, and nobody who trains with transformers has it: the peer stays in the process of
the measurement, and both take turns. The process reads a word from each line of its standard input, does that work
once, and answers with a line; it ends when its input ends.
"""

import json
import subprocess
import sys
import tempfile
from typing import Any

from core.speed.processes import environment, reason
from core.speed.task import LIMIT, OURS

MODULE = "core.speed.own_process"


class OwnProcess:
    """Our side of a measurement on a CPU, to be used as a context.

    Args:
        request: `recipe`, `overrides`, `trust` and `device` of what trains.

    Attributes:
        limit: the limit's `flops`, and `ways` in which its products of experts are computed.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self.limit: dict[str, Any] = {}

    def __enter__(self) -> "OwnProcess":
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )
        try:
            self.limit = self._ask(json.dumps(self._request))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def step(self) -> None:
        """Takes one optimizer step."""
        self._ask(OURS)

    def products(self) -> None:
        """Computes the products of the limit once."""
        self._ask(LIMIT)

    def _ask(self, line: str) -> dict[str, Any]:
        """Sends a line and waits for the answer.

        Raises:
            RuntimeError: the process has ended; the message says why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            why = reason(self._process.wait(), self._errors.read())
            raise RuntimeError(f"the process that measures our side ended: {why}")
        found: dict[str, Any] = json.loads(answer)
        return found


def main() -> None:
    """Builds what the first line asks for, and then works once for each line."""
    from core.training.host_memory import keep_freed_memory

    keep_freed_memory()
    request = json.loads(sys.stdin.readline())
    import torch

    from core.analysis.budget import plan_of
    from core.recipe.compose import compose
    from core.speed.batches import step_batches
    from core.speed.limit import Limit
    from core.speed.our_steps import OurSteps
    from core.speed.product_shapes import product_shapes

    recipe = compose(request["recipe"], request["overrides"], trust=request["trust"])
    device = torch.device(request["device"])
    steps = OurSteps(recipe, step_batches(recipe, device), device, plan_of(recipe))
    steps.backward()  # the loads of the experts
    steps.forget()
    limit = Limit(product_shapes(recipe, steps.loads), device)
    work = {OURS: steps.run, LIMIT: limit.run}
    _answer({"flops": limit.flops, "ways": limit.ways})
    for line in sys.stdin:
        work[line.strip()]()
        _answer({})


def _answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
