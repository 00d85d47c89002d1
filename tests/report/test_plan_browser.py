"""The page of a plan in a real Chromium: it draws, answers a tap, turns dark, and fits a phone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.cluster.cluster_file import Inner, Strategy, read_cluster
from core.cluster.drawing import write
from core.cluster.predict import predict
from core.cluster.subject import subject_of
from core.recipe.compose import compose

from .test_browser import DESKTOP, PHONE, Page, driver  # noqa: F401 - the fixture

PIXEL = """
const canvas = document.getElementById("canvas");
const [x, y] = [arguments[0] * canvas.width, arguments[1] * canvas.height];
return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3);
"""
TAP = """
const canvas = document.getElementById("canvas");
const box = canvas.getBoundingClientRect();
const at = { clientX: box.left + arguments[0] * box.width, clientY: box.top + arguments[1] * box.height };
canvas.dispatchEvent(new MouseEvent("click", at));
return document.getElementById("shown").textContent;
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cluster = read_cluster("h100_16")
    strategy = Strategy(ranks=2, schedule="dualpipe", inner=Inner(name="zero1"))
    layout = replace(cluster.layout, strategy=strategy, micro_batches=8)
    target = tmp_path / "plan.html"
    write(predict(subject_of(compose("dsv3_small", [])), replace(cluster, layout=layout)), target)
    return target


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_plan_is_drawn_and_answers(
    driver: Any,  # noqa: F811
    file: Path,
    tmp_path: Path,
    size: tuple[int, int],
) -> None:
    page = Page(driver, tmp_path)
    page.open(file, size)
    assert page.driver.execute_script(TAP, 0.01, 0.25).startswith("Rank 0, 0 µs to")
    assert "forward of micro-batch 0, chunk 0" in page.run(
        "return document.getElementById('shown').textContent"
    )
    light = page.driver.execute_script(PIXEL, 0.01, 0.2)
    page.run("document.getElementById('theme').click()")
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    assert page.driver.execute_script(PIXEL, 0.01, 0.2) != light
    narrow = page.run("return document.getElementById('canvas').width")
    page.run(
        "const zoom = document.getElementById('zoom'); zoom.value = 10;"
        "zoom.dispatchEvent(new Event('input'))"
    )
    assert page.run("return document.getElementById('canvas').width") > 5 * narrow
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    assert page.run("return document.querySelectorAll('#assumptions li').length") > 5
    errors = [one for one in page.driver.get_log("browser") if one["level"] != "WARNING"]
    assert not errors
    page.shot(f"plan-{size[0]}")
