"""The same runs through a real Ray on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import ROOT, Lab

from core.study.ray_pool import _task, resources
from core.study.sweep_file import Variant
from core.study.sweep_folder import Job

from .conftest import TWO, Write
from .test_processes import LONG, Runner, processes_of, until
from .test_runner import read, states


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (1, 0)),
        (["strategy.accelerator=cuda"], (1, 1)),
        (["strategy.name=ddp", "strategy.ranks=2"], (2, 0)),
        (["strategy={name: ddp, ranks: 4, accelerator: cuda}"], (4, 4)),
    ],
)
def test_resources_come_from_the_recipe(
    lab: Lab, overrides: list[str], expected: tuple[int, int]
) -> None:
    job = Job(Variant("a", lab.recipe(*overrides), "", ()), 0, Path("run"))
    assert resources(job) == expected


def test_without_ray_its_absence_is_reported(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = lab.command("sweep", write(TWO), "--out", tmp_path / "out", "--ray", "local")
    assert result.code == 2
    assert result.sentence == "--ray: Ray is not installed here: pip install 'moeloom[ray]'"


def test_a_worker_starts_our_core_beside_a_core_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker of a running cluster has another environment than the driver that `moeloom` is."""
    (tmp_path / "core").mkdir()
    (tmp_path / "core/__init__.py").touch()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", "import core; print(core.__file__)"]

    def found(log: Path) -> str:
        task = _task()
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        assert task(command, str(log), 1)[0] == 0
        return log.read_text(encoding="utf-8").strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert found(tmp_path / "moeloom.txt") == str(ROOT / "core/__init__.py")
    monkeypatch.delenv("PYTHONSAFEPATH")
    assert found(tmp_path / "module.txt") == str(tmp_path / "core/__init__.py")


def test_a_sweep_through_a_real_local_ray(write: Write, tmp_path: Path, short: Path) -> None:
    """One run that ends and one that fails; nothing is left running."""
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    text = TWO.replace("[3, 4]", "[3]").replace("steps: 2", "steps: 4")
    text = text.replace(
        "{{model.blocks.moe.ffn.balance: []}}", "{{optimizer.lr: 1.0e+30, max_skipped_steps: 1}}"
    )
    file, out = write(text + "match: {{exempt: {{none: it diverges}}}}\n"), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "core.sweep",
        str(file),
        "--out",
        str(out),
        "--ray",
        "local",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(short)}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert [row["n"] for row in json.loads(result.stdout)["rows"]] == [1, 0]
    assert states(out) == {"bias/seed-3": "done", "none/seed-3": "failed"}
    assert read(out / "runs/none/seed-3/status.json")["reason"].startswith("exit code 1: ")
    assert read(out / "runs/bias/seed-3/summary.json")["threads"] == 1
    until(lambda: not processes_of(short) and not processes_of(out), 20)


@pytest.mark.parametrize(
    ("signum", "left"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)],
)
def test_an_interrupt_saves_what_the_cluster_works_on(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    short: Path,
    signum: int,
    left: int,
) -> None:
    """Ctrl-C goes to the runner's whole process group, SIGTERM to the runner; Ray must not answer for either."""
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    text = LONG.replace("every_steps: 20", "every_steps: 1000").replace("steps: 60", "steps: 2000")
    file, out = write(text), tmp_path / "out"
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    runner = Runner(file, out, "--ray", "local")
    until(lambda: runner.step("bias/seed-3") > 3, 150)
    (os.killpg if signum == signal.SIGINT else os.kill)(runner.process.pid, signum)
    code, _, err = runner.end()
    assert code == left, err
    assert "Traceback" not in err
    assert set(states(out).values()) == {"waiting"}
    run = out / "runs/bias/seed-3"
    until(lambda: not processes_of(short) and not processes_of(out), 20)
    assert list((run / "checkpoints").glob("*.ckpt")), "nothing was saved"
    assert "stopped by SIGTERM after step" in (run / "log.txt").read_text(encoding="utf-8")
