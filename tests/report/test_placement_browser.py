"""The page of `core.placement` in a real Chromium: no request, no script, and nothing wider than the window."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.deployment.page import write
from core.deployment.work import PlacementOptions, report

from .test_browser import DESKTOP, PHONE, Page, driver  # noqa: F401 - the fixture


class StaticPage(Page):
    """A page without a script, which is drawn once it is loaded."""

    def open(self, file: Path, size: tuple[int, int] = DESKTOP) -> float:
        """Opens a file; nothing has to be waited for."""
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.resize(size)
        self.driver.get(file.as_uri())
        return 0.0


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Page:  # noqa: F811
    """A page whose screenshots go into the folder of the test."""
    return StaticPage(driver, tmp_path)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_every_layer_has_its_bars_and_nothing_is_wider_than_the_window(
    page: Page, finished: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = tmp_path / "placement.html"
    document = report(finished, PlacementOptions(gpus=4)).document
    write(document, file)
    page.open(file, size)
    assert page.run("return document.querySelectorAll('.strip').length") == 4
    assert page.run("return document.querySelectorAll('polyline').length") == 2
    assert page.run("return document.scripts.length") == 0
    shown = page.run("return document.querySelector('.facts').innerText")
    assert f"{document['prefill']['balancedness']['after']:.3f}" in shown
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    assert not page.driver.get_log("browser")
    page.shot(f"placement-{size[0]}")


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_a_large_model_on_many_gpus_fits_too(
    page: Page, tmp_path: Path, size: tuple[int, int]
) -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (2, 20, 256))
    np.save(tmp_path / "loads.npy", loads)
    options = PlacementOptions(gpus=64, nodes=8, groups=8)
    file = tmp_path / "placement.html"
    write(report(tmp_path / "loads.npy", options).document, file)
    assert file.stat().st_size < 1_000_000
    page.open(file, size)
    for place in page.run(
        "return [...document.querySelectorAll('details')].map((d) => d.open = true)"
    ):
        assert place
    assert page.run("return document.documentElement.scrollWidth") <= size[0]
    assert not page.driver.get_log("browser")
