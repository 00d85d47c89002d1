"""Mistakes that need no torch are found before it is imported, which takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from lab import ROOT, Lab

from core.numerics.compiling import assume_constant_result

PROGRAM = """\
import sys
import core.fit
from core.command import run_command

for missing in ("torch", "lightning"):
    sys.modules[missing] = None  # an import of it fails
for line in sys.stdin.read().splitlines():
    sys.argv = ["core/fit.py", *line.split("|")]
    try:
        run_command(core.fit.main, core.fit.parser())
    except SystemExit as leaving:
        print("exit code", leaving.code, file=sys.stderr)
"""


def test_paths_of_data_and_of_runs_are_checked_before_torch_is_imported(
    lab: Lab, finished: Path, tmp_path: Path
) -> None:
    pdf = tmp_path / "text.pdf"
    pdf.touch()
    out = ["--out", str(tmp_path / "run")]
    corpus = "data.corpus="
    cases = [
        (f"{corpus}{{name: files, paths: [{tmp_path}/*.txt]}}", f"the glob '{tmp_path}/*.txt'"),
        (f"{corpus}{{name: files, paths: [{tmp_path}/*]}}", f"{pdf} is matched by"),
        (f"{corpus}{{name: package_text, package: none-such}}", "package 'none-such' is not"),
    ]
    lines = []
    expected = []
    for override, sentence in cases:
        lines.append("|".join([str(lab.file), override, *out]))
        expected.append(f"moeloom: command line ({override}): data.corpus: {sentence}")
    lines.append("|".join([str(lab.file), "--out", str(finished)]))
    expected.append(f"moeloom: --out {finished}: holds a run already")
    lines.append("|".join([str(lab.file), "--resume", str(tmp_path)]))
    expected.append(f"moeloom: --resume {tmp_path}: there is no run in this folder")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(lines),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    printed = done.stderr.splitlines()
    assert printed[1::2] == ["exit code 2"] * len(lines), done.stderr
    for sentence, beginning in zip(printed[::2], expected, strict=True):
        assert sentence.startswith(beginning)
    assert not (tmp_path / "run").exists()


def test_missing_initial_weights_are_found_before_a_run_folder_is_made(
    lab: Lab, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    weights = tmp_path / "none"
    result = lab.command("fit", lab.file, f"initial_weights={weights}", "--out", run)
    assert result.code == 2
    assert result.sentence.endswith(
        f"initial_weights = {weights}: no checkpoint here: give a run folder or a checkpoint file"
    )
    assert not run.exists()


def test_a_plan_without_its_text_can_be_described(lab: Lab, tmp_path: Path) -> None:
    corpus = f"data.corpus={{name: files, paths: [{tmp_path}/*.txt]}}"
    assert lab.command("fit", lab.file, corpus, "--dry-run").code == 0


def test_the_mark_for_the_compiler_is_torchs() -> None:
    def ours() -> None:
        """Marked without the compiler."""

    def theirs() -> None:
        """Marked by torch."""

    assert vars(assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs))
