"""The pages for newcomers: every block of docs/start.md runs, and every link of these pages leads to something."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from .documents import README, ROOT, Block, blocks

DOCS = ROOT / "docs"
START, GLOSSARY, INDEX, VERIFIED = (
    DOCS / f"{name}.md" for name in ("start", "glossary", "README", "verified")
)
PAGES = [README, START, GLOSSARY, INDEX, VERIFIED]
INSTALLED = any(point.value == "core.testing.plugin" for point in entry_points(group="pytest11"))
PYTEST_OPTIONS = "-p no:cacheprovider" + ("" if INSTALLED else " -p core.testing.plugin")
FOLDER = "moeloom-start"
"""The folder that the page works in, beside the checkout."""


def file_name(block: Block) -> str | None:
    """Returns the name of the file that a block shows; None for a block of commands."""
    named = re.match(r"# ([\w/.]+\.\w+)$", block.lines[0])
    return named[1] if named else None


def script() -> str:
    """Returns all blocks of the page as one shell script: files are written, commands are run, in the page's order."""
    lines = ["set -euo pipefail"]
    for block in blocks(START):
        name = file_name(block)
        if name is not None:
            lines += [f"cat > {name} <<'END_OF_FILE'", *block.lines[1:], "END_OF_FILE"]
        else:
            assert block.language == "sh", f"a block that no test runs: {block.text}"
            lines += block.lines
    return "\n".join(lines) + "\n"


def in_shell(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder, where moeloom can be imported and has a cache of its own."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MOELOOM_CACHE": str(folder / "cache"),
        "PYTEST_ADDOPTS": PYTEST_OPTIONS,
    }
    return subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@dataclass(frozen=True)
class Walk:
    """The files and the output that the commands of the page leave.

    Args:
        folder: the folder that the page works in.
        done: exit code and output of the script.
    """

    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Runs the page from a folder that replaces the checkout and holds nothing but `docs`."""
    checkout = tmp_path_factory.mktemp("start") / "checkout"
    checkout.mkdir()
    (checkout / "docs").symlink_to(DOCS)
    return Walk(checkout.parent / FOLDER, in_shell(checkout, script()))


@pytest.mark.full
def test_every_block_of_the_page_runs(walk: Walk) -> None:
    assert walk.done.returncode == 0, walk.done.stdout + walk.done.stderr
    for run in ("first", "deepseek_v2", "mine"):
        summary = json.loads((walk.folder / "runs" / run / "summary.json").read_text())
        assert summary["steps"] == 30
        assert 0 < summary["val_bits_per_byte"] < 8
    results = json.loads((walk.folder / "sweeps/routers/results.json").read_text())
    assert {row["variant"]: row["n"] for row in results["rows"]} == {
        "deepseek_v3": 2,
        "deepseek_v2": 2,
    }
    assert (walk.folder / "sweeps/routers/report.html").stat().st_size > 1e6


@pytest.mark.full
def test_the_run_reports_dropped_tokens_and_the_owner_of_its_router(walk: Walk) -> None:
    router = "model.blocks.moe.ffn.router"
    dropped = set(re.findall(rf"dropped ({router}\.\w+):", walk.done.stderr))
    assert dropped == {f"{router}.{key}" for key in ("groups", "group_limit", "scale")}
    provenance = json.loads((walk.folder / "runs/mine/provenance.json").read_text())
    (mine,) = [part for part in provenance["components"] if part["slot"] == "router"]
    assert mine["name"] == "mixtral"
    assert Path(mine["file"]) == walk.folder / "my_router.py"


@pytest.mark.full
def test_the_kit_passes_the_router_and_fails_it_once_it_is_broken(
    walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken as the page proposes: the gates are computed from adjusted logits."""
    assert re.search(r"\d\d passed", walk.done.stdout)
    assert "failed" not in walk.done.stdout
    text = (walk.folder / "my_router.py").read_text()
    right = "gate_TK = logits_TE.gather"
    assert right in text
    broken = text.replace(right, "gate_TK = adjust_scores(logits_TE).gather")
    broken = broken.replace("my_router:", "broken_router:")
    (tmp_path / "broken_router.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)

    from core.testing.clauses import BrokenClauseError
    from core.testing.run import cases

    (gates,) = [case for case in cases("broken_router") if "never a gate" in case.check.clause]
    with pytest.raises(BrokenClauseError, match="changes a gate"):
        gates.run()


def test_the_page_links_a_term_where_it_first_uses_it() -> None:
    text = START.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"^#.*$|`[^`]*`", " ", text, flags=re.MULTILINE)
    pattern = r"\[([^\]]+)\]\(glossary\.md#[\w-]+\)"
    links = list(re.finditer(pattern, text))
    assert links
    late = []
    for link in links:
        before = re.sub(pattern, " ", text[: link.start()])
        words = r"\s+".join(re.escape(word) for word in link[1].split())
        if re.search(rf"\b{words}\b", before, re.IGNORECASE):
            late.append(link[1])
    assert late == []


def headings(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_of_another_page_has_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+\.md)#([^)]+)\)", page.read_text(encoding="utf-8"))
    gone = [
        f"{file}#{anchor}"
        for file, anchor in links
        if anchor not in headings((page.parent / file).resolve())
    ]
    assert gone == []


def test_the_glossary_lists_every_entry() -> None:
    text = GLOSSARY.read_text(encoding="utf-8")
    entries = re.findall(r"^### (.*)$", text, re.MULTILINE)
    listed = re.findall(r"\[([^\]]+)\]\(#", text.partition("\n## ")[0])
    assert listed == sorted(entries, key=str.lower)


def test_the_index_lists_every_page() -> None:
    pages = {page.name for page in DOCS.glob("*.md")} - {INDEX.name}
    linked = set(re.findall(r"\]\(([\w./]+)\)", INDEX.read_text(encoding="utf-8")))
    assert pages | {"reference/README.md"} <= linked
