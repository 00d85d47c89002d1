"""The tier `full` of the tests: whole files by this table, single tests by `@pytest.mark.full`.

It holds tests that start or kill processes, that need transformers, lm-eval, TRL, Triton, Chromium or Ray,
and cross products. Everything else is in the default tier, in which every promise has at least one test.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
FULL = {
    "commands/test_readme_command.py": "starts the README's command as a process",
    "cluster/test_published.py": "builds five models of up to 671 billion parameters on the meta device",
    "eval/test_command.py": "needs lm-eval",
    "eval/test_fine_tuning.py": "needs TRL",
    "eval/test_chat_tasks.py": "needs lm-eval and transformers",
    "eval/test_harness_model.py": "needs lm-eval",
    "eval/test_parity.py": "needs lm-eval and transformers",
    "eval/test_post_training.py": "needs TRL",
    "fuzz": "damages hundreds of folders",
    "gpu": "starts the GPU benchmark as a process",
    "interop/test_continued.py": "needs transformers",
    "interop/test_memory.py": "starts processes",
    "interop/test_parity.py": "needs transformers",
    "interop/test_parity_exports.py": "needs transformers",
    "interop/test_parity_fp8.py": "needs transformers",
    "interop/test_parity_hyper_connections.py": "needs transformers",
    "interop/test_parity_limits.py": "needs transformers",
    "interop/test_parity_mtp.py": "needs transformers",
    "interop/test_parity_sparse.py": "needs transformers",
    "interop/test_parity_trained.py": "needs transformers",
    "interop/test_parity_v4.py": "needs transformers",
    "interop/test_parity_tokenizer.py": "needs transformers",
    "interop/test_resume.py": "kills conversions",
    "interop/test_trained.py": "trains and converts runs there and back",
    "precision/test_benchmark.py": "times whole steps of every precision",
    "precision/test_native_kernels.py": "needs Triton",
    "report/test_browser.py": "needs Chromium",
    "report/test_inspect_browser.py": "needs Chromium",
    "report/test_plan_browser.py": "needs Chromium",
    "report/test_page.py": "writes a page of 30 runs of 5,000 steps",
    "report/test_placement_browser.py": "needs Chromium",
    "repository/test_tutorial.py": "starts processes",
    "study/test_processes.py": "starts and kills processes",
    "study/test_ray.py": "needs Ray",
    "training/test_ema_components.py": "trains with every component that is registered",
    "training/test_ema_runs.py": "kills runs, and trains on ranks",
    "training/test_node_processes.py": "starts the processes of two nodes",
    "training/test_profiler_ranks.py": "starts the processes of two ranks",
    "training/test_rank_failures.py": "starts, stops and kills the processes of two ranks",
    "training/test_rank_processes.py": "starts and kills the processes of two ranks",
    "training/test_ranks.py": "starts the processes of two ranks",
    "training/test_skew.py": "trains 300 steps four times",
    "training/test_table_runs.py": "trains on the ranks of forked processes",
}
"""Files and folders below `tests/`, each with the reason."""


def is_full(file: Path) -> bool:
    """Whether the table lists a test file or a folder above it."""
    if not file.is_relative_to(TESTS):
        return False
    place = file.relative_to(TESTS)
    return any(str(part) in FULL for part in (place, *place.parents))


def first_by_default(values: Iterable[Any], *, keep: int = 1, several: bool = False) -> list[Any]:
    """The values of a parameter, of which only the first few are in the default tier.

    Args:
        values: the values of one parameter, or tuples for several parameters.
        keep: how many are in the default tier.
        several: whether the values are tuples for several parameters.
    """
    parameters = []
    for index, value in enumerate(values):
        arguments = value if several else (value,)
        marks = () if index < keep else (pytest.mark.full,)
        parameters.append(pytest.param(*arguments, marks=marks))
    return parameters
