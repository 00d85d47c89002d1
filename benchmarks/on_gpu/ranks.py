"""Runs of `core.fit` on several ranks that started them themselves, watched while they go on.

What is measured inside of them comes from `benchmarks.run_plugin`, line by line, so a run that is cut short has results
up to its last step.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.measure import Lab, spread
from benchmarks.on_gpu.runs import Fits
from benchmarks.run_plugin.token_file import TOKENIZER
from benchmarks.token_file import write
from core.data.tokenizer import train

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "plugins=[benchmarks.run_plugin]"
NO_CHECKPOINTS = "checkpoint.every_steps=null"
POLL_SECONDS = 2.0
TOY_VOCABULARY = 512
TOY_TOKENS = 40_000
TOY_LENGTH = 64


def tokens_folder(lab: Lab) -> Path:
    """The folder with the token ids: the one that was given, or toy ids of the text of docs/ for a dry run."""
    if not lab.quick:
        return lab.tokens.resolve()
    texts = [page.read_text("utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    folder = (lab.folder / "toy_tokens").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "trained.json"
    source.write_text(train(texts, TOY_VOCABULARY).to_json(), encoding="utf-8")
    write(texts, source, folder, TOY_TOKENS, 2 * TOY_LENGTH * 8)
    assert (folder / TOKENIZER).is_file()
    return folder


def corpus(lab: Lab, vocabulary: int) -> list[str]:
    """Overrides for the text and its vocabulary."""
    if lab.quick:
        vocabulary = TOY_VOCABULARY
    section = f"{{name: token_file, folder: '{tokens_folder(lab)}', vocabulary: {vocabulary}}}"
    return [PLUGIN, f"data.corpus={section}", f"data.tokenizer.vocab={vocabulary}"]


def new_folder(lab: Lab, part: str) -> Path:
    """A folder that does not exist yet, below the one of the results."""
    number = 1
    while (lab.folder / f"{part}-{number}").exists():
        number += 1
    return (lab.folder / f"{part}-{number}").resolve()


def threads_of(lab: Lab, ranks: int) -> int:
    """Threads of each rank: an equal share of the cores; one in a dry run, so that ranks do not disturb each other."""
    if lab.quick:
        return 1
    return max(1, (os.cpu_count() or 1) // ranks)


def watched_run(
    folder: Path,
    recipe: str,
    overrides: list[str],
    *,
    ranks: int,
    threads: int,
    seconds: float,
    seen: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Trains a recipe, and returns what its ranks wrote.

    Args:
        folder: for the run and its log; it must be new.
        recipe: a shipped recipe.
        overrides: changes of it.
        ranks: how many processes train.
        threads: those of each.
        seconds: the run is interrupted after so many.
        seen: receives the results so far every few seconds.
    """
    began = time.time()
    with Fits(folder) as fits:
        fits.start("run", recipe, overrides, threads=threads)
        process = fits.processes["run"]
        deadline = process.began + seconds
        while not process.wait(min(deadline, time.monotonic() + POLL_SECONDS)):
            if time.monotonic() >= deadline:
                break
            seen({"overrides": overrides, **read_ranks(fits.run("run"), ranks, began)})
        outcome = fits.results(seconds)["run"]
    return {"overrides": overrides, **outcome, **read_ranks(folder / "run", ranks, began)}


def read_ranks(run: Path, ranks: int, began: float) -> dict[str, Any]:
    """The lines and profiles of all ranks so far.

    Args:
        run: the run folder.
        ranks: how many there are.
        began: when the command was started, in seconds since 1970; times of the start are counted from it.

    Returns:
        `start`: seconds from the command to each mark, by rank; `rows`: the steps of the first rank; `peak_bytes` and
        `overlap` by rank; `cpu_seconds`: processor time of each step, by rank.
    """
    names = ("start", "rows", "peak_bytes", "overlap", "cpu_seconds")
    found: dict[str, Any] = {name: [] for name in names}
    for rank in range(ranks):
        lines = _lines(run / f"steps-{rank}.jsonl")
        if not lines:
            continue
        marks, rows = lines[0], lines[1:]
        since = {name: round(at - began, 2) for name, at in marks.items()}
        if rows:
            since["first_step_done"] = round(rows[0]["at"] - began, 2)
            found["peak_bytes"].append(rows[-1].get("peak_bytes"))
        found["start"].append(since)
        found["cpu_seconds"].append([round(row["cpu_seconds"], 4) for row in rows])
        if rank == 0:
            found["rows"] = rows
        with suppress(OSError, ValueError):
            found["overlap"].append(json.loads((run / f"profile-{rank}.json").read_text()))
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    found: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in file.read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))
    return found


def step_seconds(rows: list[dict[str, Any]], warm: int) -> list[float]:
    """The seconds of the steps after the first `warm`, without those that were profiled."""
    return [row["seconds"] for row in rows if row["step"] > warm and not row["profiled"]]


def tokens_per_second(rows: list[dict[str, Any]], tokens: float, warm: int) -> dict[str, Any]:
    """Tokens per second of each step after the warm-up: median, range, and all.

    Args:
        rows: the steps of a run.
        tokens: tokens of one step, of one rank or of all.
        warm: steps that are not counted.
    """
    seconds = step_seconds(rows, warm)
    return spread([tokens / one for one in seconds]) if seconds else {}
