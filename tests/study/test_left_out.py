"""Points of a grid that are left out: by a rule, or because their recipe is refused when that is asked for."""

import json
from pathlib import Path

import pytest
from lab import Lab, run_command_here

from core.contracts.errors import UserError
from core.study.left_out import rule_for
from core.study.sweep_file import read_sweep
from core.study.sweep_folder import describe_file
from core.study.sweep_schema import SkipSection

from .conftest import ForkPool, Write

GRID = """\
title: Do depth and rate interact?
base: {base}
seeds: [3]
baseline: a+lr=0.001+depth=1
variants: {{a: {{}}}}
grid: {{optimizer.lr: [0.001, 0.01], model.heads.mtp.depth: [1, 2]}}
budget: {{steps: 2}}
match: {{params: null, flops: null, allow: [loss heads, optimizer and its schedule]}}
"""
RULE = "skip: [{{when: {{optimizer.lr: 0.01, model.heads.mtp.depth: 2}}, reason: it diverges}}]\n"


def test_a_rule_leaves_out_the_points_that_have_all_of_its_values(write: Write) -> None:
    sweep = read_sweep(write(GRID + RULE))
    assert [variant.name for variant in sweep.variants] == [
        "a+lr=0.001+depth=1",
        "a+lr=0.001+depth=2",
        "a+lr=0.01+depth=1",
    ]
    (one,) = sweep.left_out
    assert (one.name, one.reason, one.by) == ("a+lr=0.01+depth=2", "it diverges", "rule")


def test_a_rule_takes_lists_of_values_and_the_variants_that_it_is_about() -> None:
    rule = SkipSection(when={"x": [1, 2], "y": True}, variants=["a"], reason="r")
    found = []
    for section in ("a", "b"):
        for x in (1, 2, 3):
            for y in (True, 1, False):
                if rule_for([rule], section, {"x": x, "y": y}):
                    found.append((section, x, y))
    assert found == [("a", 1, True), ("a", 2, True)]
    assert rule_for([SkipSection(when={"x": [1, 2]}, reason="r")], "a", {"x": [1, 2]})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "{{when: {{optimizer.lr: 0.02}}, reason: r}}",
            "skip.0: when.optimizer.lr = 0.02: the grid",
        ),
        (
            "{{when: {{optimizer.l: 0.01}}, reason: r}}",
            "skip.0: when: 'optimizer.l' is no key of the",
        ),
        ("{{when: {{optimizer.lr: 0.01}}, reason: ' '}}", "skip.0: reason must say why"),
        ("{{when: {{optimizer.lr: 0.01}}}}", "skip.0.reason: required key is missing"),
        ("{{when: {{}}, reason: r}}", "skip.0: when must name at least one key"),
        ("{{when: {{optimizer.lr: 0.01}}, variants: [b], reason: r}}", "no variant is named 'b'"),
        ("{{when: {{optimizer.lr: [0.001, 0.01]}}, reason: r}}", "leave out every point"),
        ("{{when: {{optimizer.lr: 0.001}}, reason: r}}", "is left out: r"),
    ],
)
def test_a_wrong_rule_is_an_error_in_one_sentence(rule: str, message: str, write: Write) -> None:
    with pytest.raises(UserError) as caught:
        read_sweep(write(f"{GRID}skip: [{rule}]\n"))
    assert message in str(caught.value)


def test_a_refused_point_is_an_error_unless_it_may_be_left_out(write: Write) -> None:
    odd = GRID.replace("[1, 2]", "[1, -1]")
    with pytest.raises(UserError, match="2 of 4 variants cannot run"):
        read_sweep(write(odd))
    sweep = read_sweep(write(odd + "skip_refused: true\n"))
    assert len(sweep.variants) == len(sweep.left_out) == 2
    for one in sweep.left_out:
        assert one.by == "refused"
        assert "depth = -1" in one.reason


def test_a_mistake_that_refuses_every_point_is_still_an_error(write: Write) -> None:
    odd = GRID.replace("optimizer.lr:", "optimizer.rate:").replace("lr=0.001", "rate=0.001")
    with pytest.raises(UserError) as caught:
        read_sweep(write(odd + "skip_refused: true\n"))
    assert "every point of its grid is left out" in str(caught.value)
    assert "unknown key" in str(caught.value)


def test_a_sweep_without_rules_goes_on_in_a_folder_of_an_earlier_version(write: Write) -> None:
    assert not {"skip", "skip_refused"} & describe_file(read_sweep(write(GRID))).keys()
    assert "skip" in describe_file(read_sweep(write(GRID + RULE)))


@pytest.mark.full
def test_what_is_left_out_is_listed_in_the_dry_run_the_results_and_their_documents(
    write: Write, pool: ForkPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write(GRID + RULE))
    line = "left out: a+lr=0.01+depth=2: it diverges"
    run_command_here("sweep", file, "--dry-run")
    printed = capsys.readouterr().out
    assert line in printed
    assert "run: a+lr=0.01+depth=2" not in printed
    run_command_here("sweep", file, "--out", str(tmp_path / "it"))
    assert line in capsys.readouterr().out
    for name in ("sweep.json", "results.json"):
        (one,) = json.loads((tmp_path / "it" / name).read_text())["left_out"]
        assert one == {
            "name": "a+lr=0.01+depth=2",
            "values": {"optimizer.lr": 0.01, "model.heads.mtp.depth": 2},
            "reason": "it diverges",
            "by": "rule",
        }


def test_averaged_weights_can_be_compared_where_every_variant_keeps_them(
    lab: Lab, write: Write
) -> None:
    from core.study.matching import match

    metric = GRID + "metric: ema/val_loss\n"
    with pytest.raises(UserError, match="without a callback that averages weights as 'ema'"):
        match(read_sweep(write(metric)))
    kept = metric + "overrides: {{callbacks: [{{name: ema, decay: 0.9}}]}}\n"
    assert match(read_sweep(write(kept))).documents
    with pytest.raises(UserError, match="no run logs it"):
        read_sweep(write(GRID + "metric: ema/mfu\n"))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("overrides: {{optimizer.lr.to: 0.1}}\n", "is set by `overrides`"),
        ("", "is set by its `overrides`"),
    ],
)
def test_a_section_is_not_searched_while_a_key_inside_it_is_set(
    where: str, message: str, write: Write
) -> None:
    own = "" if where else "overrides: {{optimizer.lr.to: 0.1}}, "
    text = GRID.replace("a: {{}}", f"a: {{{{{own}search: {{{{optimizer.lr: [0.1, 0.2]}}}}}}}}")
    text = text.replace("optimizer.lr: [0.001, 0.01], ", "").replace("+lr=0.001", "")
    with pytest.raises(UserError) as caught:
        read_sweep(write(text + where + "search: {{seeds: [9]}}\n"))
    assert "optimizer.lr.to, a key inside it" in str(caught.value)
    assert message in str(caught.value)
