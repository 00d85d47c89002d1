"""Predictions: counts and memory are those of `core.describe`, parts add up, and more of a thing costs more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.analysis.activations import POLICIES
from core.analysis.memory import per_gpu
from core.analysis.parallel_layout import ParallelLayout
from core.analysis.size import size_of
from core.cluster.cluster_file import Cluster, Inner, Strategy, read_cluster
from core.cluster.drawing import render
from core.cluster.predict import predict
from core.cluster.search import search
from core.cluster.subject import Subject, subject_of
from core.contracts.errors import UserError
from core.recipe.compose import compose

WIDE = (
    "batch.sequences=8",
    "batch.accumulate=2",
    "precision.name=bf16",
    "model.blocks.moe.ffn.experts=16",
)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(compose("dsv3_small", [*WIDE]))


def cluster(**layout: Any) -> Cluster:
    """The shipped H100 cluster with another layout."""
    found = read_cluster("h100_16")
    return replace(found, layout=replace(found.layout, **{"micro_batches": None, **layout}))


def strategy(
    ranks: int = 1, schedule: str = "1f1b", data: int = 1, expert: int = 1, **more: Any
) -> Strategy:
    inner = Inner(name="zero1", ranks=data, expert_ranks=expert)
    return Strategy(ranks=ranks, schedule=schedule, inner=inner, **more)


def test_the_work_of_all_stages_is_the_flops_of_describe(subject: Subject) -> None:
    works = subject.works(2)
    forward = 0.0
    for work in works:
        forward += sum(p.flops for p in work.products) + work.attention + work.other
    # without the norms, whose weights count 6 FLOPs each
    assert 3 * forward == pytest.approx(size_of(subject.model).flops_per_token, rel=3e-3)


@pytest.mark.parametrize(("schedule", "ranks"), [("1f1b", 2), ("1f1b", 4), ("dualpipe", 2)])
def test_memory_is_that_of_describes_layout(subject: Subject, schedule: Any, ranks: int) -> None:
    for recompute in POLICIES:
        given = cluster(strategy=strategy(ranks, schedule, 2, 2), recompute=recompute)
        document = predict(subject, given).document
        expected = per_gpu(
            subject.recipe,
            subject.model,
            subject.steps,
            subject.precision.made,
            subject.precision,
            ParallelLayout(data=2, expert=2, pipeline=ranks),
            sequences=1,
            schedule=schedule,
        )
        assert document["micro_batches"] == expected["microbatches_per_step"]
        for own, row in zip(document["memory"], expected["stages"], strict=True):
            assert own["total"] == row["total"][recompute]
            assert own["blocks"] == row["blocks"]


@pytest.mark.parametrize(
    "given",
    [
        strategy(),
        strategy(2, "1f1b", 2, 2),
        strategy(2, "interleaved_1f1b", 1, chunks=2),
        strategy(2, "zb1p"),
        strategy(2, "dualpipe", 2, 2),
        strategy(2, "dualpipev"),
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_parts_add_up_to_the_step(subject: Subject, given: Strategy, overlap: bool) -> None:
    document = predict(subject, cluster(strategy=given, overlap=overlap)).document
    assert sum(document["parts"].values()) == pytest.approx(document["step_seconds"])
    assert min(document["parts"].values()) >= 0
    tokens = document["tokens_per_step"]
    assert tokens == 16 * subject.recipe.data.sequence_length
    assert document["tokens_per_day"] == pytest.approx(tokens * 86400 / document["step_seconds"])
    assert document["assumptions"]


def test_what_costs_more_takes_longer(subject: Subject) -> None:
    def step(given: Strategy = strategy(2, "1f1b", 2, 2), **layout: Any) -> float:  # noqa: B008
        found: float = predict(subject, cluster(strategy=given, **layout)).document["step_seconds"]
        return found

    plain = step()
    assert step(recompute="selective") > plain
    assert step(recompute="full") > step(recompute="selective")
    assert step(imbalance=2.0) > plain
    assert step(cast_weights="micro_batch") > plain
    assert step(micro_batches=16) > plain
    assert step(strategy(2, "zb1p", 2, 2)) < plain
    dual = strategy(2, "dualpipe", 2, 2)
    assert step(dual, overlap=True) < step(dual)


def test_a_slower_link_makes_the_exchange_longer_and_nothing_else(subject: Subject) -> None:
    given = cluster(strategy=strategy(1, "1f1b", 2, 2))
    fast = predict(subject, given).document["stages"][0]
    links = replace(given.links, inside=given.links.inside / 4)
    slow = predict(subject, replace(given, links=links)).document["stages"][0]
    for kind in ("forward", "backward_inputs"):
        assert slow[kind].pop("exchange") == pytest.approx(4 * fast[kind].pop("exchange"))
        assert slow[kind] == fast[kind]


def test_a_plan_of_very_many_actions_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="micro_batches = 1000000 on 2 stages must make at most"):
        predict(subject, cluster(strategy=strategy(2), micro_batches=1_000_000))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (strategy(8), "8 stages must be at most 5, the layers of the model"),
        (strategy(1, data=3, expert=3), "expert ranks = 3: must divide the 16 experts"),
        (strategy(2, "dualpipe", 16), "on 16 ranks must divide|micro_batches = 1 must be"),
        (strategy(1, data=5), "layout.micro_batch = 1 on 5 ranks must divide the 16 sequences"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    subject: Subject, given: Strategy, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predict(subject, cluster(strategy=given))


def test_a_search_finds_the_fastest_that_fit(subject: Subject) -> None:
    given = cluster(strategy=strategy(2, "1f1b", 2, 2))
    found = search(subject, given)
    best = found["best"]
    assert len(best) == 10
    assert found["fitting"] == found["tried"] > 100
    assert [row["step_seconds"] for row in best] == sorted(row["step_seconds"] for row in best)
    assert best[0]["step_seconds"] <= predict(subject, given).document["step_seconds"]
    for row in best:
        assert row["pipeline"] * row["data"] == given.gpus
        assert row["micro_batches"] * row["micro_batch"] * row["data"] == 16
    limit = best[0]["largest_bytes"] * 0.9
    less = search(subject, given, limit)
    assert 0 < less["fitting"] < found["fitting"]
    assert max(row["largest_bytes"] for row in less["best"]) <= limit
    assert less["best"][0]["step_seconds"] >= best[0]["step_seconds"]
    with pytest.raises(UserError, match=r"none of \d+ layouts on 4 GPUs needs at most 0.001 GB"):
        search(subject, given, 1e6)


def test_a_page_holds_its_plan_and_cannot_be_ended_by_a_name(subject: Subject) -> None:
    prediction = predict(subject, cluster(strategy=strategy(2, "dualpipe", 2, 2)))
    prediction.document["recipe"] = "</script><b>.yaml"
    page = render(prediction)
    assert page.count("</script>") == 2
    assert "http" not in page.split("<script")[1]
    assert "/*" not in page.split("</style>")[1].split("<script>")[0]


def test_the_command_prints_draws_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from core.describe import main, parser

    page = tmp_path / "plan.html"
    main(parser().parse_args(["dsv3_small", *WIDE, "--cluster", "h200_2", "--draw", str(page)]))
    said = capsys.readouterr().out
    assert "2 GPUs, 8 micro-batches" in said
    assert "assumed: every expert has the mean load" in said
    assert page.read_text().startswith("<!DOCTYPE html>")
    for arguments, message in (
        (["--draw", "a"], "--draw needs a cluster"),
        (["--search"], "--search needs a cluster"),
        (["--cluster", "h200_2", "--layout", "data=2"], "--layout does not go with --cluster"),
        (["--cluster", "h200_2", "--memory-limit", "3"], "--memory-limit limits a search"),
        (["--cluster", "h200_2", "--search", "--memory-limit", "-3"], "--memory-limit: -3 must be"),
        (["--cluster", "h200_2", "--search", "--draw", "a"], "--draw draws one layout"),
    ):
        with pytest.raises(UserError, match=message):
            main(parser().parse_args(["dsv3_small", *arguments]))
