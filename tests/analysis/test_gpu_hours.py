"""GPU-hours against the report's 2.664 million (arXiv 2412.19437, table 1), and when there is nothing to say."""

import json
from typing import TYPE_CHECKING, Any

import pytest

import core
from core.analysis.describe import document_of
from core.analysis.gpu_hours import H800_MFU, H800_PEAK
from core.analysis.options import DescribeOptions

if TYPE_CHECKING:
    from lab import Lab


def cost_of(name: str, *overrides: str, **options: Any) -> dict[str, Any] | None:
    """`gpu_hours` of the description."""
    found: dict[str, Any] | None = document_of(
        core.compose(name, overrides), DescribeOptions(**options)
    )["gpu_hours"]
    return found


def test_deepseek_v3s_pre_training() -> None:
    """2,664K H800-hours, within 0.5%; the multi-token module excluded, as the utilisation's FLOPs exclude it."""
    cost = cost_of("dsv3_671b")
    assert cost is not None
    assert cost["hours"] == pytest.approx(2.664e6, rel=0.005)
    assert cost["gpu"] == "H800"
    assert cost["hours"] == cost["flops_per_token"] * cost["tokens"] / (0.3894 * 989e12) / 3600
    assert round(cost["flops_per_token"] / 1e9, 3) == 249.812
    assert 0 <= cost["tokens"] - 14.8e12 < 15_360 * 4096


def test_the_published_utilisation_is_of_the_count_that_is_used() -> None:
    """arXiv 2505.09343, table 4: 19.926 s a step of 15,360 sequences on 2,048 GPUs, 38.94% and 385 TFLOPS causal."""
    tokens_per_second_and_gpu = 15_360 * 4096 / 19.926 / 2048
    reached = 249.812e9 * tokens_per_second_and_gpu
    assert reached / 1e12 == pytest.approx(385, abs=0.5)
    assert reached / H800_PEAK == pytest.approx(H800_MFU, abs=0.00005)
    by_the_papers_count = 250.456e9 * tokens_per_second_and_gpu / H800_PEAK
    assert (
        abs(by_the_papers_count - H800_MFU) > 0.0005
    )  # the other convention does not give the printed digits


def test_another_gpu_and_another_utilisation() -> None:
    published, faster, both = (
        cost_of("dsv3_16b", **o) for o in ({}, {"mfu": 0.5}, {"mfu": 0.5, "tflops": 2000.0})
    )
    assert published is not None
    assert faster is not None
    assert both is not None
    assert faster["hours"] == pytest.approx(published["hours"] * H800_MFU / 0.5)
    assert both["hours"] == pytest.approx(faster["hours"] * 989 / 2000)
    assert (faster["gpu"], both["gpu"], both["source"]) == ("H800", "GPU", "as given")


def test_fp32_says_nothing_of_a_bf16_peak() -> None:
    assert cost_of("dsv3_small") is None
    assert cost_of("dsv3_small", mfu=0.4) is None
    given = cost_of("dsv3_small", mfu=0.4, tflops=1.0)
    assert given is not None
    assert given["hours"] == given["flops_per_token"] * given["tokens"] / (0.4 * 1e12 * 3600)


def test_the_hours_are_printed_with_what_they_assume(lab: "Lab") -> None:
    assert "-hours:" not in lab.command("describe", lab.file).out
    result = lab.command("describe", lab.file, "--mfu", "0.4", "--gpu-peak", "100")
    assert "GPU-hours: " in result.out
    assert "at 40.00% of 100 TFLOPS (as given)" in result.out
    document = json.loads(lab.command("describe", lab.file, "--json").out)
    assert document["gpu_hours"] is None
