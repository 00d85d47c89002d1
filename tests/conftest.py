"""The tiers of the tests; a small recipe and one finished run of it, which many tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiers import is_full

# Set before torch is imported: tensors are small, and tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What tests record stays out of the user's own folder; processes that tests start inherit it.
_STATE = tempfile.TemporaryDirectory(prefix="moeloom-state-")
os.environ["MOELOOM_STATE"] = _STATE.name

if TYPE_CHECKING:
    from lab import Lab


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores files whose every test is in the tier `full` if it is not run; None lets pytest decide."""
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    if config.option.markexpr == "not full" and collection_path not in named:
        return True if is_full(collection_path) else None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the files that `tests/tiers.py` lists; `pytest -m full` runs them, plain `pytest` all others."""
    for item in items:
        if is_full(item.path):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Lab"]:
    """The small recipe, with a cache of its own, in a process with one thread."""
    import torch
    from lab import Lab

    import core.run.training

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELOOM_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        # The real measurement takes 0.3 s a run.
        patch.setattr(core.run.training, "measured_peak_flops", lambda device: 1e11)
        yield Lab(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(lab: "Lab", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run of the small recipe; tests must only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    lab.fit(folder)
    return folder
