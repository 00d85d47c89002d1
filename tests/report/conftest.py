"""Folders of synthetic runs and sweeps that several tests read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.study.sweep_folder import SweepFolder

from .synthetic import Made, write_run, write_sweep

HOSTILE = 'a<b>&"c"'
EVIL = "</script><script>document.title = 'broken'</script>"
LONG = "expert_choice+router.top_k=2+capacity_factor=1.25+lr=0.003"
REASON = f"exit code 1{EVIL}: the gradient norm was nan for 20 steps in a row"


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 6 variants x 5 seeds x 5,000 steps, all done."""
    folder = tmp_path_factory.mktemp("large") / "routing"
    usual = {"steps": 5000, "snapshots": 256}
    made = {
        "deepseek_v3": Made(level=4.20, **usual),
        "aux_loss": Made(level=4.23, uneven=0.15, biased=False, **usual),
        "sequence_only": Made(level=4.205, uneven=0.5, biased=False, **usual),
        "no_balancing": Made(level=4.19, uneven=2.2, biased=False, **usual),
        "switch": Made(level=4.3, uneven=0.9, biased=False, depths=2, **usual),
        "dense": Made(level=4.35, uneven=None, biased=False, depths=0, **usual),
    }
    write_sweep(folder, made, [0, 1, 2, 3, 4])
    return folder


@pytest.fixture(scope="session")
def under_way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sweep with runs in every state, names that are markup, and every cause of a warning; its lock is held."""
    folder = tmp_path_factory.mktemp("under_way") / "odd"
    forced = Made(300, 4.6, 0.0, biased=False, notices=["Forced balance is a bound, not a method."])
    ahead = Made(300, 4.1, 0.01, biased=False, notices=["Experts choose tokens: it is not causal."])
    made = {
        "deepseek_v3": Made(300),
        HOSTILE: Made(300, 4.3, 0.6, biased=False),
        LONG: ahead,
        "forced": forced,
    }
    but = {
        ("deepseek_v3", 2): Made(120, state="running"),
        (HOSTILE, 1): Made(150, state="failed", reason=REASON, diverges=True),
        (HOSTILE, 2): Made(state="waiting"),
        ("forced", 2): Made(state="waiting"),
    }
    unequal = ["forced: another steps than deepseek_v3 (it is a bound)"]
    write_sweep(
        folder,
        made,
        [0, 1, 2],
        but=but,
        title=f"Which one, & is it <real>? {EVIL}",
        not_equal=unequal,
    )
    with SweepFolder(folder).locked():
        yield folder


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with two multi-token depths."""
    folder = tmp_path_factory.mktemp("single") / "run"
    write_run(folder, Made(800, depths=2))
    return folder
