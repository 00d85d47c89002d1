"""The page of `core.inspect` in a real Chromium: clicks choose an expert, and phones do not scroll sideways."""

from pathlib import Path
from typing import Any

import pytest

from core.inspection.page import write
from core.inspection.work import Options, inspect

from .test_browser import DESKTOP, PHONE, Page, driver  # noqa: F401 - the fixture


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Page:  # noqa: F811
    """A page whose screenshots go into the folder of the test."""
    return Page(driver, tmp_path)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_click_shows_an_expert_and_its_tokens(
    page: Page, finished: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = tmp_path / "inspect.html"
    document = inspect(finished, Options(beside=finished)).document
    write(document, file)
    page.open(file, size)
    layers = document["layers"]
    cells = page.run("return document.querySelectorAll('#map .cell').length")
    assert cells == sum(len(layer["experts"]) for layer in layers)
    assert page.run("return document.getElementById('expert').innerText")
    page.run("document.querySelectorAll('#map .cell')[10].click()")
    shown = page.run("return document.querySelector('#expert h2').innerText")
    assert shown == "mtp 1, expert 2"
    own = page.run("return document.querySelectorAll('#text .own').length")
    assert own == document["reading"]["first"][layers[1]["path"]].count(2)
    page.run("document.querySelectorAll('#checkpoints button')[1].click()")
    assert page.run("return document.querySelectorAll('#map .cell').length") == cells
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    assert not page.driver.get_log("browser")
    page.shot(f"inspect-{size[0]}")


def test_a_model_without_experts_says_so(page: Page, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "dense.html"
    document = inspect(finished, Options()).document
    document["layers"] = []
    document["reading"]["first"] = {}
    write(document, file)
    page.open(file)
    assert page.run("return document.getElementById('dense').checkVisibility()")
    assert not page.run("return document.getElementById('map').checkVisibility()")
    assert not page.driver.get_log("browser")
