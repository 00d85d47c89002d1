"""The content of reports on sweeps and on single runs, finished or not."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.reports.cost import seconds_of
from core.reports.page import context, figures_of, render
from core.reports.provenance import facts
from core.reports.study_files import Run, read
from core.reports.words import in_short, metric_words, signed
from core.statistics.comparison import CENSORED, NOT_AFTER_HOLM
from core.storage import lock

from .conftest import EVIL, HOSTILE, LONG
from .synthetic import Made, write_json, write_run, write_sweep

pd = pytest.importorskip("pandas", reason="the extra `report` is not installed")
pytest.importorskip("plotly", reason="the extra `report` is not installed")

QUESTION = "Which of the "
"""The beginning of the question that a sweep answers; it comes after the warnings."""


def page(folder: Path) -> str:
    """The report on a folder, without plotly's script."""
    from plotly.offline import get_plotlyjs

    whole = render(read(folder))
    assert get_plotlyjs() in whole
    return whole.replace(get_plotlyjs(), "")


def words(text: str) -> str:
    """The text that a reader sees: no markup, one space between words."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body.replace("<wbr>", ""))))


def cells(folder: Path, variant: str) -> dict[str, Any]:
    """The cells of a variant in the results table, by heading."""
    table = context(read(folder))["results"]
    row = next(row for row in table.rows if row[0].value == variant)
    return {column.title: cell for column, cell in zip(table.columns, row, strict=True)}


def test_a_report_names_no_other_machine_and_forbids_asking_one(under_way: Path) -> None:
    text = page(under_way)
    assert not re.findall(r"""(?:src|href|action)\s*=|@import|url\(|https?://""", text)
    assert "default-src 'none'" in text


def test_a_large_sweep_stays_below_15_megabytes(large: Path) -> None:
    size = len(render(read(large)).encode())
    print(f"30 runs x 5,000 steps: {size / 1e6:.2f} MB")
    assert size < 15e6


def test_the_order_is_progress_warnings_question_results(under_way: Path) -> None:
    text = words(page(under_way))
    order = [
        "In progress: 8 of 12 runs done (1 running, 1 failed, 2 waiting)",
        "Read this first",
        QUESTION,
        "Results",
    ]
    assert sorted(order, key=text.index) == order


def test_runs_whose_runner_was_killed_are_not_in_progress(under_way: Path, tmp_path: Path) -> None:
    """Their files still say that they run, but no process holds the folder's lock."""
    copy = shutil.copytree(under_way, tmp_path / "odd")
    text = words(page(copy))
    assert "Not finished: 8 of 12 runs done (1 interrupted, 1 failed, 2 waiting)" in text


def test_every_warning_stands_once_with_the_run_or_variant_that_it_concerns(
    under_way: Path,
) -> None:
    text = words(page(under_way)).partition(QUESTION)[0]
    sentences = [
        f"{HOSTILE}, seed 1: exit code 1",
        f"{HOSTILE}, seed 1: 75 steps, because the gradient was not finite",
        "forced: another steps than deepseek_v3 (it is a bound)",
        "forced: Forced balance is a bound, not a method.",
        f"{LONG}: Experts choose tokens: it is not causal.",
    ]
    assert [text.count(sentence) for sentence in sentences] == [1] * len(sentences)


def test_a_variant_that_is_not_causal_has_a_note_even_where_none_is_recorded(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20), "b": Made(20)}, [0, 1])
    document = json.loads((tmp_path / "s/sweep.json").read_text())
    document["variants"][1]["causal"] = False
    write_json(tmp_path / "s/sweep.json", document)
    assert "b: not causal" in words(page(tmp_path / "s")).partition(QUESTION)[0]
    assert cells(tmp_path / "s", "b")["verdict"].under == "not causal"


def test_a_finished_run_whose_metric_is_no_number_is_reported(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20)}, [0, 1])
    file = tmp_path / "s/runs/a/seed-1/summary.json"
    write_json(file, json.loads(file.read_text()) | {"val_bits_per_byte": None})
    text = words(page(tmp_path / "s")).partition(QUESTION)[0]
    assert "Runs without a result a, seed 1: finished without a finite val_bits_per_byte" in text


def test_what_comes_from_files_is_text(under_way: Path) -> None:
    text = page(under_way)
    assert text.count("<script") == 3
    assert EVIL not in text
    assert "<b>" not in text
    assert EVIL in words(text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    drawn = [t.get("name", "") for figure in data["figures"] for t in figure["traces"]]
    assert 'a&lt;b&gt;&amp;"c"' in drawn
    assert not any("<" in name.replace("<br>", "") for name in drawn)


def test_the_table_has_the_numbers_of_the_results(large: Path) -> None:
    row = next(
        r
        for r in json.loads((large / "results.json").read_text())["rows"]
        if r["variant"] == "switch"
    )
    found = cells(large, "switch")
    assert found["mean"].value == row["mean"]
    assert found["mean"].under == f"{row['low']:.4f} to {row['high']:.4f}"
    assert found["difference"].text == f"+{row['difference']['mean']:.4f}"
    assert (found["verdict"].text, found["seeds"].text) == ("worse", "5 of 5")
    assert (found["params"].text, found["KV bytes"].text, found["capacity"].text) == (
        "5.105M",
        "512",
        "none",
    )
    assert re.fullmatch(r"[\d,]+ to [\d,]+", found["tokens/s"].under)
    assert cells(large, "deepseek_v3")["verdict"].text == "baseline"
    assert cells(large, "no_balancing")["verdict"].text == "no difference shown"
    assert cells(large, "dense")["MaxVio"].text == "–"  # noqa: RUF001


def test_in_short_gives_every_verdict_with_its_caveat(large: Path, under_way: Path) -> None:
    text = words(page(large))
    assert "No difference to deepseek_v3 shown: no_balancing." in text
    assert re.search(r"Worse than deepseek_v3: .*switch and dense\.", text)
    text = words(page(under_way))
    assert f"Better than deepseek_v3: {LONG} (see its note)." in text
    assert "Worse than deepseek_v3: forced (see its note, not held equal)." in text
    assert f"Too few seeds in common with deepseek_v3 to say: {HOSTILE} (1 of 3 failed)." in text


def judged(folder: Path, verdicts: dict[str, str]) -> None:
    """Replaces verdicts in `results.json`."""
    document = json.loads((folder / "results.json").read_text())
    for row in document["rows"]:
        if row["variant"] in verdicts:
            row["difference"]["verdict"] = verdicts[row["variant"]]
    write_json(folder / "results.json", document)


def test_what_holms_correction_takes_away_has_words_and_a_mark_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_sweep(folder, {name: Made(20) for name in ("a", "b", "c", "d")}, [0, 1])
    judged(folder, {"b": NOT_AFTER_HOLM, "c": "no difference shown", "d": "worse"})
    figure = figures_of(read(folder), "bits")[0]
    symbols = {str(trace["name"]): str(trace["marker"]["symbol"]) for trace in figure.traces}
    assert [symbols[name].partition("-")[2] for name in "bc"] == [
        "open-dot",
        "up-open",
    ]  # a square, a triangle-up
    assert symbols["d"] == "diamond"
    assert (
        "Hollow marks with a dot: the interval leaves out 0, but not after that correction."
        in figure.note
    )
    assert cells(folder, "b")["verdict"].text == "not shown after Holm's correction"
    text = words(page(folder))
    sentence = (
        "No difference to a shown after Holm's correction, though the interval leaves out 0: b."
    )
    assert (
        text.index("Worse than a: d.")
        < text.index(sentence)
        < text.index("No difference to a shown: c.")
    )
    judged(folder, {"b": "no difference shown"})
    assert "with a dot" not in words(page(folder))


def test_variants_with_a_lower_bound_are_named_as_not_compared(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20), "b": Made(20), "c": Made(20)}, [0, 1])
    judged(tmp_path / "s", {"b": CENSORED, "c": "better"})
    bound = "a run ended before its load was balanced, so its value is only a lower bound"
    assert in_short(read(tmp_path / "s")) == [
        "Better than a: c.",
        f"Not compared with a, because {bound}: b.",
    ]


def test_failed_seeds_stand_with_the_verdict(tmp_path: Path) -> None:
    but = {(name, 2): Made(20, state="failed", reason="killed") for name in ("a", "b")}
    write_sweep(
        tmp_path / "s", {"a": Made(20), "b": Made(20, level=5.0), "c": Made(20)}, [0, 1, 2], but=but
    )
    file = tmp_path / "s/runs/c/seed-1/summary.json"
    write_json(file, json.loads(file.read_text()) | {"val_bits_per_byte": None})
    sentences = in_short(read(tmp_path / "s"))
    assert any(line.startswith("Worse than a: b (1 of 3 failed)") for line in sentences)
    assert any("c (1 of 3 without a value)" in line for line in sentences)
    assert (
        sentences[-1] == "All of this rests on fewer seeds of a than were planned (1 of 3 failed)."
    )
    assert cells(tmp_path / "s", "b")["verdict"].under == "1 of 3 failed"


def test_a_loss_that_rises_above_its_first_is_reported_though_it_stayed_finite(
    tmp_path: Path,
) -> None:
    write_sweep(tmp_path / "s", {"a": Made(40), "b": Made(40)}, [0, 1])
    assert "Losses that rose" not in words(page(tmp_path / "s"))
    file = tmp_path / "s/runs/b/seed-1/metrics.csv"
    frame = pd.read_csv(file)
    first = frame["loss/next_token"].iloc[0]
    frame.loc[frame["step"] == 14, "loss/next_token"] = first + 0.25
    frame.to_csv(file, index=False)
    text = words(page(tmp_path / "s")).partition(QUESTION)[0]
    sentence = f"b, seed 1: {first + 0.25:.2f} nats at step 14, from {first:.2f} at first"
    assert f"Losses that rose above where they began {sentence}" in text


@pytest.mark.parametrize("name", ["large", "under_way", "single"])
def test_plotly_knows_every_key_of_every_figure(name: str, request: pytest.FixtureRequest) -> None:
    import plotly.graph_objects as go

    study = read(request.getfixturevalue(name))
    for figure in figures_of(study, metric_words(study.metric)):
        assert figure.missing is None
        go.Figure(
            data=figure.traces, layout=figure.layout
        )  # raises where a key or a value is none of plotly's


def test_the_paired_loss_has_a_panel_for_each_variant_around_zero(
    large: Path, under_way: Path
) -> None:
    study = read(large)
    figures = {figure.key: figure for figure in figures_of(study, "bits")}
    figure = figures["paired"]
    assert figure.title == "Training loss minus that of deepseek_v3"
    assert [note["text"] for note in figure.layout["annotations"]] == [
        f"<b>{n}</b>" for n in study.variants[1:]
    ]
    assert figure.panels == 5
    lines = {t["name"]: t for t in figure.traces if t["line"]["width"] > 1}
    assert [lines[name].get("xaxis") for name in study.variants[1:]] == [
        None,
        "x2",
        "x3",
        "x4",
        "x5",
    ]
    assert lines["switch"]["y"][-1] == pytest.approx(0.1, abs=0.02)  # made so: 4.3 and 4.2
    low, high = figure.layout["yaxis"]["range"]
    assert low < 0 < high
    assert len(figure.traces) == 10  # a band and a line for each
    assert not any("fill" in trace for trace in figures["loss"].traces)  # bands only there
    thin = {figure.key: figure for figure in figures_of(read(under_way), "bits")}["paired"]
    assert "single seeds of which a run has not finished, or failed" in thin.note


def test_runs_of_unequal_length_are_reported_beside_their_difference(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(60), "b": Made(40)}, [0, 1])
    figure = {figure.key: figure for figure in figures_of(read(tmp_path / "s"), "bits")}["paired"]
    assert "The runs are of unequal length" in figure.note
    assert max(x for trace in figure.traces for x in trace["x"]) <= 40 * 2048


def test_a_figure_without_data_says_why(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"dense": Made(20, uneven=None, depths=0)}, [0])
    text = words(page(tmp_path / "s"))
    assert "there are no expert layers, or no step has been done" in text
    assert "No run has a multi-token module" in text
    assert "No interval can be given yet" in text
    assert "No run has recorded its experts' loads" in text


def test_runs_that_were_validated_once_are_marks_not_lines(tmp_path: Path, single: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20), "b": Made(20, depths=2)}, [0, 1])
    shutil.copytree(single, tmp_path / "run")
    for file in tmp_path.rglob("metrics.csv"):
        first, *rest = file.read_text().splitlines()
        trained = [line for line in rest if not line.startswith(",") and line.split(",")[1]]
        file.write_text("\n".join([first, *trained, rest[-1], ""]))
    figures = {figure.key: figure for figure in figures_of(read(tmp_path / "s"), "bits")}
    assert figures["validation"].note.startswith("No run was validated more than once.")
    assert figures["mtp"].layout["yaxis"]["categoryarray"] == [
        "a, depth 1",
        "b, depth 1",
        "b, depth 2",
    ]
    assert "The run was validated only once: fraction 0.75 (depth 1), 0.55 (depth 2)." in words(
        page(tmp_path / "run")
    )


def test_one_seed_gives_means_without_intervals(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20), "b": Made(20)}, [7])
    found = cells(tmp_path / "s", "b")
    assert (found["mean"].under, found["difference"].under, found["verdict"].text) == (
        "",
        "",
        "too few seeds",
    )
    assert "There are too few seeds to distinguish any variant from a." in words(
        page(tmp_path / "s")
    )


def test_a_difference_has_a_sign_unless_it_is_shown_as_nothing() -> None:
    shown = [signed(value, 3) for value in (0.01, -0.01, -0.0001, 0.0)]
    assert shown == ["+0.010", "\N{MINUS SIGN}0.010", "0.000", "0.000"]


def test_a_sweep_that_has_only_begun(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(state="waiting"), "b": Made(state="waiting")}, [0, 1])
    for name in ("sweep.json", "results.json"):
        text = words(page(tmp_path / "s"))
        assert "In progress: 0 of 4 runs done (4 waiting)" in text
        (tmp_path / "s" / name).unlink()
    (tmp_path / "s/sweep.yaml").write_text(
        "{name: s, seeds: [0, 1], baseline: a, recipes: {a: {}, b: {}}}"
    )
    assert "In progress: 0 of 4 runs done (4 waiting)" in words(page(tmp_path / "s"))


def test_provenance_differences_and_commands(under_way: Path, single: Path) -> None:
    text = words(page(under_way))
    assert "python -m core.sweep routing.yaml --out it" in text
    assert "loom-twist 2.0, moeloom 0.1.0" in text
    assert "torch 2.13.0+cpu" in text
    assert f"model.blocks.moe.ffn.router.name deepseek_v3 {HOSTILE}" in text
    assert "python -m core.fit 'recipes/with space.yaml' budget.steps=60 --out runs/it" in words(
        page(single)
    )


@pytest.mark.parametrize("typed", ["moeloom fit a.yaml seed=3", "python -m core.fit a.yaml seed=3"])
def test_the_command_stands_as_it_was_typed(single: Path, tmp_path: Path, typed: str) -> None:
    run = shutil.copytree(single, tmp_path / "run")
    recorded = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    (run / "provenance.json").write_text(json.dumps({**recorded, "command": typed}))
    assert f" {typed} Recorded by the runs" in words(page(run))


def test_the_commit_and_the_machine_are_reported(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20)}, [0, 1])
    known = {
        "cpu": "A fast one",
        "cores": 8,
        "gpus": ["GPU A", "GPU A", "GPU B"],
        "commit": "c0ffee",
        "dirty": False,
    }
    for seed, dirty in ((0, False), (1, True)):
        file = tmp_path / f"s/runs/a/seed-{seed}/provenance.json"
        write_json(file, json.loads(file.read_text()) | known | {"dirty": dirty})
    recorded = dict(facts(read(tmp_path / "s")))
    assert recorded["commit"] == ["c0ffee (1 of 2 runs)", "c0ffee, with changes (1 of 2 runs)"]
    assert (recorded["cpu"], recorded["cores"]) == (["A fast one"], ["8"])
    assert recorded["GPU"] == ["2 \N{MULTIPLICATION SIGN} GPU A, GPU B"]
    assert not {"dirty", "gpus"} & set(recorded)


def test_different_values_of_provenance_are_reported_with_their_runs(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20)}, [0, 1, 2])
    file = tmp_path / "s/runs/a/seed-1/provenance.json"
    write_json(file, json.loads(file.read_text()) | {"python": "3.13.1"})
    text = words(page(tmp_path / "s"))
    assert "3.11.7 (2 of 3 runs)" in text
    assert "3.13.1 (1 of 3 runs)" in text


def test_a_run_alone_has_its_numbers_and_no_comparison(single: Path) -> None:
    text = words(page(single))
    assert "val_bits_per_byte" in text
    assert "Nothing is compared" in text
    assert "In progress" not in text
    assert 'id="results"' not in page(single)


def test_a_run_alone_sets_its_loss_against_what_it_cost(single: Path) -> None:
    study = read(single)
    figures = {figure.key: figure for figure in figures_of(study, "bits")}
    loss, flops, seconds = (figures[key].traces[0] for key in ("loss", "flops", "time"))
    (run,) = study.runs
    assert loss["y"] == pytest.approx(flops["y"], rel=0.02)
    assert flops["x"][-1] == run.summary["flops_per_token"] * run.summary["tokens"]
    assert figures["time"].layout["xaxis"]["title"]["text"] == "minutes of training"
    assert 60 * seconds["x"][-1] == pytest.approx(
        run.summary["train_seconds"], rel=0.1
    )  # noise in its making: 3% twice
    assert [trace["name"] for trace in figures["time"].traces] == [
        trace["name"] for trace in figures["loss"].traces
    ]


def test_the_time_of_steps_is_their_tokens_over_their_speed() -> None:
    frame = pd.DataFrame(
        {"tokens": [10.0, 20, 20, 40], "tokens_per_second": [float("nan"), 5, float("nan"), 10]}
    )
    assert list(seconds_of(Run("a", 0, Path(), "done", metrics=frame))) == [
        2,
        4,
        4,
        6,
    ]  # the third row is a validation
    assert seconds_of(Run("a", 0, Path(), "done", metrics=frame[["tokens"]])) is None


def test_a_run_alone_that_is_not_finished_has_no_flops_but_a_time(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Made(40, state="running"))
    figures = {figure.key: figure for figure in figures_of(read(tmp_path / "run"), "bits")}
    assert "written when the run is complete" in str(figures["flops"].missing)
    assert figures["time"].missing is None
    assert figures["time"].title == "Training loss against time"


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Made(40, state="running"))
    assert "step 40 of 80" in words(page(tmp_path / "run"))
    (tmp_path / "run/metrics.csv").unlink()
    assert "no step has been logged yet" in words(page(tmp_path / "run"))


def test_files_that_are_half_written_are_reported_and_left_out(
    tmp_path: Path, single: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(single, folder)
    for name in ("summary.json", "provenance.json", "loads.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    with (folder / "metrics.csv").open("a") as file:
        file.write('801,"16')
    text = words(page(folder))
    for name in ("summary.json", "provenance.json", "loads.safetensors"):
        assert f"{name} could not be read" in text
    assert text.count("could not be read") == 3
    assert "step 80" in text


def test_a_folder_that_the_code_itself_wrote(finished: Path) -> None:
    filled = context(read(finished))
    assert [figure.key for figure in filled["figures"] if figure.missing] in (
        [],
        ["throughput"],
    )  # a short run
    assert [layer["experts"] for layer in filled["experts"].runs[0]["layers"]] == [8, 8]
    assert all(layer["bias"] for layer in filled["experts"].runs[0]["layers"])
    assert ("val_bits_per_byte", filled["numbers"][0][1]) != ("", "")
    assert not filled["warnings"]
    assert filled["progress"] is None


def test_a_sweep_in_which_nothing_runs_is_not_asked_for_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20)}, [0, 1])
    (tmp_path / "s/.lock").write_text("")
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: pytest.fail("the lock was taken"))
    assert [run.state for run in read(tmp_path / "s").runs] == ["done", "done"]


@pytest.mark.parametrize("place", ["recipe.yaml", "metrics.csv", "provenance.json"])
def test_a_page_shows_nothing_from_outside_of_its_folder(tmp_path: Path, place: str) -> None:
    write_run(tmp_path / "run", Made(20))
    (tmp_path / "secret").write_text('{"secret": 1}')
    (tmp_path / "run" / place).unlink(missing_ok=True)
    (tmp_path / "run" / place).symlink_to(tmp_path / "secret")
    study = read(tmp_path / "run")
    assert study.unread == [
        f"{place} could not be read (a symbolic link leads out of the folder), "
        "so the report leaves it out."
    ]
    assert "secret" not in study.file


def test_a_sweeps_names_lead_to_no_folder_outside(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(20)}, [0])
    write_run(tmp_path / "mine/seed-0", Made(20))
    file = tmp_path / "s/sweep.json"
    identity = json.loads(file.read_text())
    identity["variants"].append({**identity["variants"][0], "name": "../../mine"})
    identity["seeds"].append("0/../../../../mine/seed-0")
    write_json(file, identity)
    study = read(tmp_path / "s")
    assert [(run.variant, run.seed) for run in study.runs] == [("a", 0)]
    assert study.unread == ["'../../mine' cannot be the name of a variant, so it is left out."]


DAMAGES: dict[str, tuple[str, tuple[Any, ...], Any]] = {
    "held equal": ("sweep.json", ("held_equal",), 10**30),
    "not equal": ("sweep.json", ("not_equal",), True),
    "seeds": ("sweep.json", ("seeds",), 3),
    "a caveat": ("sweep.json", ("variants", 0, "notices"), 3),
    "a difference of recipes": ("sweep.json", ("variants", 1, "differences"), {"seed": 3}),
    "a row": ("results.json", ("rows", 0), 3),
    "the rows": ("results.json", ("rows",), 3),
    "a row of no variant": ("results.json", ("rows", 1), {"mean": 1.0}),
    "an end of an interval": ("results.json", ("rows", 0, "high"), "x"),
    "a difference": ("results.json", ("rows", 1, "difference"), [3]),
    "a mean difference": ("results.json", ("rows", 1, "difference", "mean"), None),
    "a state": ("runs/a/seed-0/status.json", ("seconds",), 10**400),
    "a huge number": ("runs/a/seed-0/summary.json", ("val_bits_per_byte",), 10**400),
    "a product that is infinite": ("runs/a/seed-0/summary.json", ("flops_per_token",), -1e308),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_report_of_a_damaged_sweep_leaves_out_what_is_damaged(tmp_path: Path, name: str) -> None:
    file, path, value = DAMAGES[name]
    folder = tmp_path / "s"
    write_sweep(folder, {"a": Made(20), "b": Made(20, 4.3)}, [0, 1])
    (folder / "runs/a/seed-²").mkdir()
    document = json.loads((folder / file).read_text(encoding="utf-8"))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_json(folder / file, document)
    text = words(page(folder))
    assert "Which of the 1 other variants" in text
    assert "Every run" in text
