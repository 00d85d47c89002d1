"""Shows that a change moved no number: trains a base commit and the working tree on this machine, compares the bits.

    python tools/same_bits.py main~3                     every case
    python tools/same_bits.py HEAD --only dsv3_small     one case, against the uncommitted changes
    python tools/same_bits.py HEAD --list                what would run

The base commit is checked out into a git worktree of its own, the change is a copy of the working tree. Both train the
same recipes at toy sizes: dsv3_small, every baseline, every precision, accumulation, recomputation, routing and
balancing options, and two gloo ranks. Compared are metrics.csv without its time columns, the weights, biases, optimizer
state and loads at the end, the resolved recipe, the summary and the sample. The change also resumes and evaluates run
folders that the base wrote. Nothing is compared with a stored digest: bits depend on processor, threads and torch.

It needs git and the Python environment in which moeloom runs. Exit code 0: the same; 1: something differs; 2: misuse.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from run_cases import Command
from run_differences import differences, evaluation_differences

TOOLS = Path(__file__).resolve().parent
FFN = "model.blocks.moe.ffn"
BATCH_SCOPE = f"{FFN}.balance=[{{name: bias, rate: 0.01}}, {{name: batch, alpha: 0.01}}]"

OPTIONS: dict[str, tuple[str, ...]] = {
    "accumulate": ("batch.accumulate=2",),
    "accumulate_batch_scope": ("batch.accumulate=2", BATCH_SCOPE),
    "recompute": ("recompute.blocks=[dense, moe]",),
    "mask_documents": ("data.mask_documents=true",),
    "tied_embedding": ("model.tied_embedding=true",),
    "mtp_depth_2": ("model.heads.mtp.depth=2",),
    "no_query_rank": ("model.attention.q_rank=null",),
    "bf16_moments": ("optimizer.moments=bf16",),
    "expert_choice": (f"{FFN}.router={{name: expert_choice, top_k: 2}}", f"{FFN}.balance=[]"),
    "forced_balance": (f"{FFN}.router={{name: forced_balance, top_k: 2}}", f"{FFN}.balance=[]"),
    "softmax": (f"{FFN}.router={{name: deepseek_v3, top_k: 2, affinity: softmax}}",),
    "bias_multiplicative": (
        f"{FFN}.balance=[{{name: bias, rate: 0.01, form: multiplicative, centre: true}}]",
    ),
    "balance_losses": (
        f"{FFN}.balance=[{{name: bias, rate: 0.01}}, {{name: sequence, alpha: 0.01}}, {{name: z_loss}}]",
    ),
    "fp8_delayed": ("precision={name: fp8_emulated, scaling: delayed}",),
    "fp8_ue8m0": ("precision={name: fp8_emulated, scales: ue8m0, stream: bf16}",),
    "fp8_native_row": ("precision={name: fp8_native, scaling: row}",),
    "fp8_accumulator": ("precision={name: fp8_emulated, accumulator_bits: 14}",),
}
"""Overrides of further cases of dsv3_small, by the name of the case."""

RESUMED = ("dsv3_small", "accumulate", "bf16_moments", "fp8_delayed", "baselines/gshard")
"""Cases of which the change resumes a half-finished run folder of the base."""


@dataclass(frozen=True)
class Case:
    """One training run.

    Args:
        name: the name in the report and of the run folder.
        recipe: the name of a shipped recipe.
        overrides: overrides in addition to the toy sizes.
        ranks: the number of processes that train together over gloo.
    """

    name: str
    recipe: str = "dsv3_small"
    overrides: tuple[str, ...] = ()
    ranks: int = 1


@dataclass(frozen=True)
class Side:
    """One of the two versions.

    Args:
        label: `base` or `change`.
        source: the folder of its files.
        folder: the folder for its runs, its cache and its plugin metadata.
    """

    label: str
    source: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        """Environment variables with which Python finds only this version and its entry points."""
        paths = os.pathsep.join(map(str, (self.folder / "site", self.source)))
        own = {"PYTHONPATH": paths, "MOELOOM_CACHE": str(self.folder / "cache")}
        fixed = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
        }
        return {**os.environ, **fixed, **own, "PYTHONDONTWRITEBYTECODE": "1"}

    def write_metadata(self) -> None:
        """Registers this version's plugins as an installed distribution would, in place of the installed one."""
        text = (self.source / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        info = self.folder / "site" / "moeloom-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moeloom\nVersion: 0\n")
        points = project["entry-points"]["moeloom.plugins"]
        lines = [f"{name} = {module}\n" for name, module in points.items()]
        (info / "entry_points.txt").write_text("[moeloom.plugins]\n" + "".join(lines))

    def run(self, commands: Sequence[Command]) -> "subprocess.Popen[bytes]":
        """Starts a worker that runs some commands one after the other and writes their exit codes."""
        (self.folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
        worker = [sys.executable, str(TOOLS / "run_cases.py"), str(self.folder)]
        return subprocess.Popen(worker, cwd=self.source, env=self.environment())

    def exit_codes(self) -> dict[str, int]:
        """The exit codes of the last `run`, by command name."""
        text = (self.folder / "exit_codes.json").read_text(encoding="utf-8")
        codes: dict[str, int] = json.loads(text)
        return codes

    def error(self, name: str) -> str:
        """The last line that a command printed on stderr, without this side's own folders."""
        file = self.folder / "logs" / f"{name.replace('/', '.')}.err"
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        return last.replace(str(self.source), "SOURCE").replace(str(self.folder), "FOLDER")


def git(*arguments: str) -> str:
    """The output of a git command in this repository."""
    command = ["git", "-C", str(TOOLS.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def both_sides(base: str, folder: Path) -> Iterator[tuple[Side, Side]]:
    """The base commit in a worktree and a copy of the working tree; the worktree is removed at the end."""
    root = Path(git("rev-parse", "--show-toplevel").strip())
    base_side = Side("base", folder / "base" / "source", folder / "base")
    change_side = Side("change", folder / "change" / "source", folder / "change")
    git("worktree", "add", "--detach", "--force", str(base_side.source), base)
    try:
        known = ("--cached", "--others", "--exclude-standard", "-z")
        names = git("ls-files", *known, "--", "core", "plugins", "recipes")
        for name in ["pyproject.toml", *names.split("\0")]:
            if (root / name).is_file():
                target = change_side.source / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, target)
        for side in (base_side, change_side):
            side.write_metadata()
        yield base_side, change_side
    finally:
        git("worktree", "remove", "--force", str(base_side.source))


def write_corpus(folder: Path) -> None:
    """Writes 31 made-up documents; the 11th and the 31st are the validation split."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijkl", k=draw.randint(2, 6))) for _ in range(80)]
    for index in range(31):
        text = " ".join(draw.choices(words, k=60))
        (folder / f"document-{index:02d}.txt").write_text(text, encoding="utf-8")


def precisions(side: Side) -> list[str]:
    """Names of the precisions that a version has."""
    command = [sys.executable, "-m", "core.catalog", "--json"]
    done = subprocess.run(
        command, cwd=side.source, env=side.environment(), check=True, capture_output=True, text=True
    )
    rows = json.loads(done.stdout)
    return sorted(row["name"] for row in rows if row["slot"] == "precision")


def all_cases(side: Side) -> list[Case]:
    """All cases: one for each recipe, precision and option of the base."""
    cases = [Case("dsv3_small")]
    for file in sorted((side.source / "recipes" / "baselines").glob("*.yaml")):
        cases.append(Case(f"baselines/{file.stem}", recipe=f"baselines/{file.stem}"))
    for name in precisions(side):
        cases.append(Case(f"precision/{name}", overrides=(f"precision={{name: {name}}}",)))
    for name, overrides in OPTIONS.items():
        cases.append(Case(name, overrides=overrides))
    ranks = ("strategy={name: ddp, ranks: 2, accelerator: cpu}",)
    cases.append(Case("two_ranks", overrides=ranks, ranks=2))
    accumulate = (*ranks, "batch.accumulate=2", BATCH_SCOPE)
    cases.append(Case("two_ranks_accumulate", overrides=accumulate, ranks=2))
    return cases


def fit_arguments(case: Case, corpus: Path, steps: int, out: Path) -> list[str]:
    """The command-line arguments of `core.fit` for one case at toy sizes."""
    sizes = [
        "model.dim=48",
        f"data.corpus={{name: files, paths: ['{corpus}/*.txt']}}",
        "data.tokenizer.vocab=300",
        "data.sequence_length=32",
        "batch.sequences=4",
        f"budget={{steps: {steps}}}",
        f"checkpoint={{every_steps: {steps // 2}, keep: 2}}",
        f"validation={{every_steps: {steps // 2}, sequences: 8}}",
        "trainer.enable_progress_bar=false",
    ]
    return [case.recipe, *sizes, *case.overrides, "--out", str(out)]


def train_both(sides: tuple[Side, Side], cases: Sequence[Case], corpus: Path, steps: int) -> None:
    """Runs every case on both sides, both sides at once."""
    workers = []
    for side in sides:
        commands = []
        for case in cases:
            arguments = fit_arguments(case, corpus, steps, side.folder / "runs" / case.name)
            commands.append(_command(case.name, "core.fit", arguments, case.ranks))
        workers.append(side.run(commands))
    for worker in workers:
        worker.wait()


def _command(name: str, module: str, arguments: list[str], processes: int = 1) -> Command:
    return Command(name=name, module=module, arguments=arguments, processes=processes)


def compare_cases(sides: tuple[Side, Side], cases: Sequence[Case]) -> dict[str, list[str]]:
    """The differences in each case; none if both sides end with the same user error."""
    base, change = sides
    base_codes = base.exit_codes()
    change_codes = change.exit_codes()
    found = {}
    for case in cases:
        codes = (base_codes[case.name], change_codes[case.name])
        errors = (base.error(case.name), change.error(case.name))
        runs = [side.folder / "runs" / case.name for side in sides]
        if codes == (0, 0):
            found[case.name] = differences(*runs)
        elif codes == (2, 2) and errors[0] == errors[1]:
            print(f"  {case.name}: does not run here: {errors[0]}")
            found[case.name] = []
        else:
            ends = f"exit codes {codes[0]} and {codes[1]}: {errors[0]!r} and {errors[1]!r}"
            found[case.name] = [ends]
    return found


def resume_and_evaluate(
    sides: tuple[Side, Side], cases: Sequence[Case], corpus: Path, steps: int
) -> dict[str, list[str]]:
    """The differences when the change resumes runs of the base after half of their steps, and evaluates them."""
    base, change = sides
    trained = base.exit_codes()
    resumed = [case for case in cases if case.name in RESUMED and trained[case.name] == 0]
    evaluated = [case for case in cases if case.ranks == 1 and trained[case.name] == 0]
    commands = []
    for case in resumed:
        folder = change.folder / "resumed" / case.name
        shutil.copytree(base.folder / "runs" / case.name, folder)
        _forget_second_half(folder)
        arguments = [*fit_arguments(case, corpus, steps, folder), "--resume", str(folder)]
        commands.append(_command(f"resume/{case.name}", "core.fit", arguments))
    evaluations = []
    for case in evaluated:
        arguments = [str(base.folder / "runs" / case.name), "--json"]
        evaluations.append(_command(f"evaluate/{case.name}", "core.evaluate", arguments))
    workers = [base.run(evaluations), change.run([*commands, *evaluations])]
    for worker in workers:
        worker.wait()
    return _second_differences(sides, resumed, evaluated)


def _second_differences(
    sides: tuple[Side, Side], resumed: list[Case], evaluated: list[Case]
) -> dict[str, list[str]]:
    base, change = sides
    found: dict[str, list[str]] = {}
    codes = change.exit_codes()
    base_codes = base.exit_codes()
    for case in resumed:
        name = f"resume/{case.name}"
        found[name] = [f"exit code {codes[name]}: {change.error(name)}"]
        if codes[name] == 0:
            resumed_run = change.folder / "resumed" / case.name
            found[name] = differences(base.folder / "runs" / case.name, resumed_run)
    for case in evaluated:
        name = f"evaluate/{case.name}"
        found[name] = [f"exit codes {base_codes[name]} and {codes[name]}: {change.error(name)}"]
        if codes[name] == base_codes[name] == 0:
            outputs = [side.folder / "logs" / f"{name.replace('/', '.')}.out" for side in sides]
            found[name] = evaluation_differences(*outputs)
    return found


def _forget_second_half(folder: Path) -> None:
    """Reduces a finished run folder to what a kill after its first checkpoint would leave."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    for checkpoint in checkpoints[1:]:
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        else:
            checkpoint.unlink()
    for name in ("summary.json", "sample.txt"):
        (folder / name).unlink()


def parser() -> argparse.ArgumentParser:
    """The parser of the command-line arguments."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("base", help="the commit to compare with")
    p.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="cases by name, e.g. 'precision/*'",
    )
    p.add_argument(
        "--steps", type=int, default=20, help="optimizer steps of each run, an even number (20)"
    )
    p.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the runs of both sides in this new folder"
    )
    p.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return p


def main() -> int:
    """Compares both versions and prints a report; returns the exit code."""
    arguments = parser().parse_args()
    if arguments.steps < 2 or arguments.steps % 2:
        parser().error(f"--steps {arguments.steps}: must be an even number of at least 2")
    if arguments.keep is not None and arguments.keep.exists():
        parser().error(f"--keep {arguments.keep}: must not exist yet")
    try:
        commit = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}").strip()
    except subprocess.CalledProcessError:
        parser().error(f"{arguments.base}: no such commit")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.keep is None else arguments.keep.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with both_sides(commit, folder) as sides:
            return _compare(sides, commit, arguments)


def _compare(sides: tuple[Side, Side], commit: str, arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    cases = all_cases(sides[0])
    if arguments.only:
        patterns = arguments.only
        cases = [case for case in cases if any(fnmatch(case.name, p) for p in patterns)]
    if not cases:
        print(f"no case is named {', '.join(arguments.only)}")
        return 2
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    size = f"{len(cases)} cases of {arguments.steps} steps"
    print(f"base {commit[:12]}, change: the working tree; {size}", flush=True)
    corpus = sides[0].folder.parent / "corpus"
    write_corpus(corpus)
    train_both(sides, cases, corpus, arguments.steps)
    found = compare_cases(sides, cases)
    codes = sides[0].exit_codes()
    failed_alike = sum(codes[name] == 2 and not lines for name, lines in found.items())
    found |= resume_and_evaluate(sides, cases, corpus, arguments.steps)
    different = {name: lines for name, lines in found.items() if lines}
    for name, lines in different.items():
        print(f"  {name} DIFFERS")
        for line in lines[:8]:
            print(f"    {line}")
        if len(lines) > 8:
            print(f"    and {len(lines) - 8} more")
    verdict = "the same bits"
    if different:
        verdict = f"{len(different)} of {len(found)} comparisons differ"
    if failed_alike:
        print(
            f"{failed_alike} of the comparisons are of cases that both sides end with an error: no number is compared"
        )
    print(f"{len(found)} comparisons in {time.monotonic() - began:.0f} s: {verdict}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
