"""Layouts: the error messages for impossible ones, and how layers become stages."""

import json
from typing import TYPE_CHECKING

import pytest

from core.analysis.parallel_layout import ParallelLayout, check, parse, stage_sizes
from core.contracts.errors import UserError

if TYPE_CHECKING:
    from lab import Lab


def test_a_layout_is_read() -> None:
    assert parse("data=128,expert=64,pipeline=16") == ParallelLayout(
        data=128, expert=64, pipeline=16
    )
    assert parse(" pipeline=2 ") == ParallelLayout(data=1, expert=1, pipeline=2)
    assert (
        parse("data=128,expert=64,pipeline=16").gpus == 2048
    )  # the experts' ranks are among the data ranks


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tensor=2", "--layout: unknown axis 'tensor'; known: data, expert, pipeline"),
        (
            "experts=2",
            "--layout: unknown axis 'experts'; did you mean expert? known: data, expert, pipeline",
        ),
        ("data=8,data=4", "--layout: data is given twice"),
        ("data", "--layout: 'data' is not AXIS=SIZE; write data=8,expert=4,pipeline=2"),
        ("", "--layout: '' is not AXIS=SIZE; write data=8,expert=4,pipeline=2"),
        ("data=0", "must be a whole number of at least 1"),
        ("data=-8", "--layout: data = '-8' must be a whole number of at least 1"),
        ("data=1.5", "must be a whole number of at least 1"),
        ("data=²", "must be a whole number of at least 1"),
    ],
)
def test_what_is_no_layout_is_reported(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            ParallelLayout(data=96, expert=48),
            "expert = 48 must divide the 256 routed experts of a layer",
        ),
        (ParallelLayout(data=96, expert=64), "expert = 64 must divide data = 96"),
        (ParallelLayout(data=7), "data = 7 must divide batch.sequences = 3072"),
        (
            ParallelLayout(pipeline=63),
            "pipeline = 63 must be at most 62, the layers with multi-token modules",
        ),
    ],
)
def test_what_does_not_divide_is_reported(layout: ParallelLayout, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check(layout, experts=[256] * 59, layers=62, sequences=3072)
    assert sentence in str(caught.value)


def test_a_dense_model_has_no_expert_axis() -> None:
    with pytest.raises(UserError, match="expert = 2 must be 1: the model has no routed experts"):
        check(ParallelLayout(data=2, expert=2), experts=[], layers=4, sequences=8)


def test_stages_are_even_and_the_ends_are_the_shorter_ones() -> None:
    assert stage_sizes(62, 16) == [
        3,
        *[4] * 14,
        3,
    ]  # DeepSeek-V3: 61 blocks and a multi-token module
    assert stage_sizes(61, 16) == [3, *[4] * 13, 3, 3]
    assert stage_sizes(8, 4) == [2, 2, 2, 2]
    assert stage_sizes(5, 5) == [1] * 5
    for layers in range(1, 30):
        for stages in range(1, layers + 1):
            sizes = stage_sizes(layers, stages)
            assert (len(sizes), sum(sizes)) == (stages, layers)
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layout", "tensor=2"], "unknown axis 'tensor'"),
        (["--layout", "data=3"], "data = 3 must divide batch.sequences = 4"),
        (
            ["--layout", "data=2", "--microbatch", "3"],
            "--microbatch: 3 must divide 2, the sequences of a micro-batch",
        ),
        (["--layout", "data=2", "--microbatch", "0"], "--microbatch: 0 must divide 2"),
        (["--layout", "pipeline=4"], "pipeline = 4 must be at most 3"),
        (
            ["--layout", "data=2,expert=2,pipeline=3", "--schedule", "dualpipe"],
            "dualpipe needs an even number",
        ),
        (
            ["--layout", "data=4,pipeline=2", "--schedule", "dualpipe"],
            "at least twice the 2 stages; a step has 2 of 1",
        ),
        (["--microbatch", "1"], "--microbatch needs a layout"),
        (["--schedule", "1f1b"], "--schedule needs a layout"),
        (
            ["--layout", "data=2", "--compare", "dsv3_small"],
            "--layout describes one recipe: leave out --compare",
        ),
        (["--mfu", "38.94"], "--mfu: 38.94 must be more than 0 and at most 1"),
        (["--mfu", "nan"], "--mfu: nan must be more than 0"),
        (["--gpu-peak", "989e12"], "must be a GPU's dense peak in TFLOPS"),
    ],
)
def test_a_command_left_with_one_sentence(lab: "Lab", arguments: list[str], sentence: str) -> None:
    result = lab.command("describe", lab.file, *arguments)
    assert result.code == 2
    assert sentence in result.sentence
    assert result.out == ""


def test_a_layout_is_one_json_document_and_a_table(lab: "Lab") -> None:
    arguments = ["--layout", "data=2,expert=2,pipeline=3"]
    result = lab.command("describe", lab.file, "--json", *arguments)
    assert result.code == 0, result.err
    layout = json.loads(result.out)["layout"]
    assert (layout["gpus"], layout["axes"]) == (6, {"data": 2, "expert": 2, "pipeline": 3})
    assert [row["blocks"] for row in layout["stages"]] == [
        ["blocks.0"],
        ["blocks.1"],
        ["heads.mtp.depths.0.block"],
    ]
    assert [row["waiting"] for row in layout["stages"]] == [3, 2, 1]
    assert (layout["microbatch_sequences"], layout["microbatches_per_step"]) == (
        1,
        2 * 2,
    )  # 4 / 2 ranks, 2 at a time
    output = lab.command("describe", lab.file, *arguments).out
    assert (
        "6 GPUs (data 2, expert 2, pipeline 3), schedule 1f1b, 4 micro-batches of 1 sequences a step"
        in output
    )
    assert "the fullest GPU holds" in output
    assert json.loads(lab.command("describe", lab.file, "--json").out)["layout"] is None
