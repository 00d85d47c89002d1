"""Cluster files: shipped ones are read, and a mistake is one sentence with file, key, value and what is allowed."""

from pathlib import Path

import pytest

from core.cluster.cluster_file import SHIPPED, Efficiencies, read_cluster
from core.contracts.errors import UserError

GOOD = """\
device: {name: G, bf16: 1e15, fp8: 2e15, fp32: 6e13, bandwidth: 3e12, memory: 8e10}
links: {gpus_per_node: 8, inside: 2e11, between: 5e10}
"""
LAYOUT = "layout: {strategy: {name: pipeline, ranks: 4, inner: {name: zero1, ranks: 4}}}\n"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_clusters_are_read_by_name_and_have_the_measured_efficiencies(file: Path) -> None:
    cluster = read_cluster(file.stem)
    assert cluster == read_cluster(str(file))
    assert cluster.efficiencies == Efficiencies()
    assert cluster.gpus == int(file.stem.split("_")[1])
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "layuot: {}\n", "unknown key layuot; did you mean layout?"),
        ("- 1\n", "must be a section of keys"),
        ("a: [\n", "is no YAML in line 2"),
        (GOOD.replace("2e11", "fast"), "links.inside = 'fast' must be a finite number above 0"),
        (GOOD.replace("2e11", "-2e11"), "links.inside = '-2e11' must be a finite number above 0"),
        (GOOD.replace("2e11", ".nan"), "links.inside = nan must be a finite number above 0"),
        (GOOD.replace("2e11", ".inf"), "links.inside = inf must be a finite number above 0"),
        (GOOD.replace("per_node: 8", "per_node: 0"), "gpus_per_node = 0 must be a whole number of"),
        (GOOD.replace(" memory: 8e10", ""), "device.memory is missing"),
        ("links: {gpus_per_node: 8, inside: 1, between: 1}\n", "device is missing"),
        (GOOD + "layout: 3\n", "layout = 3 must be a mapping"),
        (GOOD + "layout: {overlap: 1}\n", "layout.overlap = 1 must be true or false"),
        (
            GOOD + "layout: {recompute: some}\n",
            "layout.recompute = 'some' must be one of none, sel",
        ),
        (GOOD + "layout: {precision: fp4}\n", "layout.precision = 'fp4' must be one of bf16, fp8"),
        (GOOD + "layout: {micro_batch: 1.5}\n", "layout.micro_batch = 1.5 must be a whole number"),
        (
            GOOD + "layout: {micro_batch: true}\n",
            "layout.micro_batch = True must be a whole number",
        ),
        (
            GOOD + "layout: {micro_batch: null}\n",
            "layout.micro_batch = None must be a whole number",
        ),
        (GOOD + "layout: {imbalance: 0.5}\n", "layout.imbalance = 0.5 must be at least 1"),
        (
            GOOD + LAYOUT.replace("ranks: 4, inner", "schedule: gpipe, inner"),
            "layout.strategy.schedule = 'gpipe' must be one of 1f1b, interleaved_1f1b",
        ),
        (
            GOOD + LAYOUT.replace("zero1, ranks: 4", "zero1, ranks: 4, expert_ranks: 3"),
            "layout.strategy.inner.expert_ranks = 3 must divide ranks = 4",
        ),
        (
            GOOD + LAYOUT.replace("ranks: 4, inner", "ranks: 4, chunks: 2, inner"),
            "layout.strategy.chunks = 2 must be 1 under schedule 1f1b",
        ),
        (
            GOOD + LAYOUT.replace("zero1", "single"),
            "layout.strategy.inner.ranks = 4 must be 1 for single",
        ),
        (
            GOOD + LAYOUT.replace("zero1, ranks: 4", "fsdp, ranks: 4, expert_ranks: 2"),
            "layout.strategy.inner.expert_ranks = 2 must be 1 for fsdp",
        ),
        (
            GOOD + LAYOUT.replace("ranks: 4, inner", "ranks: 1, schedule: zb1p, inner"),
            "layout.strategy.schedule = 'zb1p' must be left out with ranks = 1",
        ),
        (GOOD + LAYOUT.replace("zero1, ranks: 4", "zero1, ranks: 9999999"), "GPUs must be at most"),
        (
            GOOD + "layout: {communication_multiprocessors: 132}\n",
            "layout.communication_multiprocessors = 132 must be less than device.multiprocessors",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_cluster(str(file))
    said = str(error.value)
    assert message in said
    assert str(file) in said
    assert "\n" not in said


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"--cluster nowhere: no such file; give .*h800_2048"):
        read_cluster("nowhere")
