"""The README's first command does what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lab import ROOT, Lab, rows


def train_command() -> str:
    """The first line of the README's first fenced block, without the installation."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.split("```")[1].splitlines()[1]
    install, _, train = first.partition(" && ")
    assert install == "pip install -e ."
    return train


def test_the_readmes_fit_command_runs_as_it_stands_two_steps_long(lab: Lab, tmp_path: Path) -> None:
    """The command runs in a shell in the root of the checkout, on our texts instead of 12 MB."""
    command = train_command()
    assert command.startswith("python -m core.fit recipes/dsv3_small.yaml")
    short = [
        *("budget={steps: 2, tokens: null, flops: null}", "trainer.enable_progress_bar=false"),
        *(f"data.corpus={{name: files, paths: ['{lab.texts}/*.txt']}}", "data.tokenizer.vocab=300"),
        *("data.sequence_length=32", "--out", str(tmp_path / "run"), "--json"),
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    shell = ["bash", "-c", f'{command} "$@"', "bash", *short]
    done = subprocess.run(
        shell, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "2"]
