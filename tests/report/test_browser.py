"""Reports in a real Chromium: drawing, sorting, printing, small screens, and no request to any other machine."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from core.reports.page import write
from core.reports.table import COLUMNS

from .conftest import EVIL, HOSTILE

pytest.importorskip("pandas", reason="the extra `report` is not installed")
pytest.importorskip("plotly", reason="the extra `report` is not installed")
pytest.importorskip(
    "selenium", reason="selenium is not installed: no report was opened in a browser"
)
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip(
        "chromium or chromedriver is missing: no report was opened in a browser",
        allow_module_level=True,
    )

FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-dev-shm-usage",
    "hide-scrollbars",
    "no-first-run",
)
ENTER, SPACE, HOME = "\ue007", "\ue00d", "\ue011"
"""Keys as WebDriver numbers them."""
DESKTOP, PHONE, PAPER = (1280, 900), (390, 844), (1040, 720)


class Page:
    """A report that is open.

    Args:
        driver: the browser.
        shots: where screenshots go.
    """

    def __init__(self, driver: Any, shots: Path) -> None:
        self.driver = driver
        self.shots = shots

    def open(self, file: Path, size: tuple[int, int] = DESKTOP) -> float:
        """Opens a file and waits until it is drawn; returns the milliseconds since the start of loading."""
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.command("Emulation.setEmulatedMedia", media="")
        self.resize(size)
        self.driver.get(file.as_uri())
        return float(self.wait("return document.documentElement.dataset.drawn"))

    def run(self, script: str) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script)

    def wait(self, script: str) -> Any:
        """The value of a script, as soon as it is a true one."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60).until(lambda _: self.run(script))

    def command(self, name: str, **arguments: Any) -> Any:
        """Sends a command of the Chrome DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def resize(self, size: tuple[int, int]) -> None:
        """Gives the window another size."""
        width, height = size
        measures = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": size == PHONE,
        }
        self.command("Emulation.setDeviceMetricsOverride", **measures)

    def shot(self, name: str) -> None:
        """Saves a screenshot of the whole page."""
        taken = self.command(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=self.whole()
        )
        (self.shots / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))

    def whole(self) -> dict[str, float]:
        """The rectangle of the whole page."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def column(self, heading: str) -> list[str]:
        """The shown cells of a column of the results table."""
        return list(
            self.run(
                "const table = document.getElementById('results');"
                "const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];"
                f"const index = heads.findIndex((head) => head.innerText.startsWith({json.dumps(heading)}));"
                "return [...table.tBodies[0].rows].filter((row) => !row.hidden)"
                ".map((row) => row.cells[index].innerText.split('\\n')[0])"
            )
        )

    def heading(self, title: str) -> Any:
        """A button that sorts the results table."""
        buttons = self.driver.find_elements("css selector", "#results thead button")
        return next(button for button in buttons if button.text.startswith(title))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """One Chromium for all tests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield chromium
    chromium.quit()


@pytest.fixture
def page(driver: Any, tmp_path: Path) -> Page:
    """A page whose screenshots go into the folder of the test."""
    return Page(driver, tmp_path)


@pytest.fixture(scope="module")
def reports(
    large: Path, under_way: Path, single: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The three reports by name."""
    folder = tmp_path_factory.mktemp("reports")
    files = {name: folder / f"{name}.html" for name in ("large", "under_way", "single")}
    for (_, file), study in zip(files.items(), (large, under_way, single), strict=True):
        write(study, file)
    return files


DRAWN = """
const marks = ".main-svg .scatterlayer .trace, .main-svg .heatmaplayer image";
return [...document.querySelectorAll(".plot")].filter((plot) => !plot.hidden).map((plot) => [
  plot.id, (plot.data || []).length, plot.querySelectorAll(marks).length,
])
"""


@pytest.mark.parametrize(("name", "figures"), [("large", 11), ("under_way", 11), ("single", 9)])
def test_every_figure_draws_and_nothing_leaves_the_file(
    name: str, figures: int, page: Page, reports: dict[str, Path]
) -> None:
    took = page.open(reports[name])
    print(
        f"{name}: drawn {took:.0f} ms after loading began, {reports[name].stat().st_size / 1e6:.2f} MB"
    )
    drawn = page.run(DRAWN)
    assert len(drawn) == figures
    assert [plot for plot, traces, marks in drawn if not traces or not marks] == []
    assert page.driver.get_log("browser") == []
    messages = [
        json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")
    ]
    requested = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert reports[name].as_uri() in requested
    assert [
        url for url in requested if not url.startswith((reports[name].as_uri(), "data:", "blob:"))
    ] == []
    assert (
        page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    )
    page.shot(f"{name}-desktop")


def test_no_button_sends_anything_away(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["single"])
    titles = set(
        page.run(
            "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
        )
    )
    assert titles <= {
        "Download plot as a PNG",
        "Download plot as a png",
        "Zoom",
        "Pan",
        "Zoom in",
        "Zoom out",
        "Reset axes",
    }
    assert (
        page.run(
            "return document.querySelectorAll('a[href], form, iframe, link, script[src]').length"
        )
        == 0
    )


def test_the_table_sorts_by_click_and_by_key(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["large"])
    before = page.column("mean")
    page.heading("mean").click()
    assert page.column("mean") == sorted(before, key=float)
    assert page.column("variant")[0] == "no_balancing"
    page.heading("mean").send_keys(ENTER)
    assert page.column("mean") == sorted(before, key=float, reverse=True)
    page.heading("MaxVio").send_keys(SPACE)
    assert page.column("MaxVio") == ["0.150", "0.200", "0.500", "0.900", "2.200", "–"]  # noqa: RUF001 - nothing is last
    page.heading("MaxVio").click()
    assert page.column("MaxVio")[-2:] == ["0.150", "–"]  # noqa: RUF001 - either way
    states = page.run(
        "return [...document.querySelectorAll('#results [aria-sort]')].map((h) => h.getAttribute('aria-sort'))"
    )
    assert states == ["descending"]


def test_the_table_shows_the_rows_that_are_asked_for(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["large"])
    box = page.driver.find_element("id", "results-filter")
    box.send_keys("WORSE seq")
    assert page.column("variant") == ["sequence_only"]
    assert page.driver.find_element("id", "results-count").text == "1 of 6 rows"
    box.clear()
    box.send_keys(" ")
    assert len(page.column("variant")) == 6


def test_the_slider_the_run_and_the_layer_change_what_is_shown(
    page: Page, reports: dict[str, Path], large: Path
) -> None:
    page.open(reports["large"])
    shown = (
        "return JSON.stringify(document.getElementById('plot-{}').data.map((trace) => trace.{}))"
    )
    load, bias = page.run(shown.format("load", "z")), page.run(shown.format("bias", "y"))
    slider = page.driver.find_element("id", "step-choice")
    slider.send_keys(HOME)
    assert page.run(shown.format("load", "z")) != load
    assert page.driver.find_element("id", "step-shown").text == "step 1"
    page.driver.find_element("css selector", "#layer-choice option:last-child").click()
    assert page.run(shown.format("bias", "y")) != bias
    options = page.driver.find_elements("css selector", "#run-choice option")
    next(o for o in options if o.text == "no_balancing, seed 1").click()
    assert "No selection bias is recorded" in page.driver.find_element("id", "bias-missing").text
    assert page.driver.find_element("id", "step-shown").text == "step 5,000"
    tensors = load_file(large / "runs/no_balancing/seed-1/loads.safetensors")
    idle = sum(
        int((counts[-1] == 0).sum()) for name, counts in tensors.items() if name.startswith("load.")
    )
    marks = "return document.getElementById('plot-load').data[0].text.flat().filter((mark) => mark !== '').length"
    assert page.run(marks) == idle >= 8
    assert page.driver.get_log("browser") == []


def test_names_are_drawn_as_they_are(page: Page, reports: dict[str, Path]) -> None:
    page.open(reports["under_way"])
    assert page.run("return document.title") == f"Which one, & is it <real>? {EVIL}"
    legend = page.run(
        "return [...document.querySelectorAll('#plot-loss .legendtext')].map((e) => e.textContent)"
    )
    assert HOSTILE in legend
    assert HOSTILE in page.column("variant")
    options = page.run(
        "return [...document.querySelectorAll('#run-choice option')].map((o) => o.text)"
    )
    assert f"{HOSTILE}, seed 0" in options


@pytest.mark.parametrize("name", ["under_way", "single"])
def test_a_phone_scrolls_the_table_not_the_page(
    name: str, page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports[name], PHONE)
    assert page.run("return document.documentElement.scrollWidth") <= PHONE[0]
    wide = (
        "return [...document.querySelectorAll('.plot .main-svg')]"
        ".filter((e) => e.getBoundingClientRect().right > 390)"
    )
    assert page.run(wide) == []
    if name == "under_way":
        assert page.run(
            "const box = document.querySelector('.scroll'); return box.scrollWidth > box.clientWidth"
        )
        assert page.driver.find_element("id", "results-hint").is_displayed()
        head = "document.querySelector('#results thead tr:last-child').cells[{}].getBoundingClientRect().right"
        assert page.column("verdict")[0] == "baseline"
        assert (
            page.run(f"return {head.format(1)}") <= PHONE[0] < page.run(f"return {head.format(4)}")
        )
        panels = "document.getElementById('plot-paired')._fullLayout"
        assert page.run(f"return [{panels}.grid.rows, {panels}.grid.columns]") == [3, 1]
    page.shot(f"{name}-phone")


LEGENDS = """
const box = (plot, part) => plot.querySelector(part).getBoundingClientRect();
return [...document.querySelectorAll(".plot")].filter((plot) => plot.querySelector(".legend")).map((plot) => [
  plot.id,
  box(plot, ".legend").top - box(plot, ".xtitle").bottom,
  plot.getBoundingClientRect().bottom - box(plot, ".legend").bottom,
])
"""


@pytest.mark.parametrize("name", ["large", "under_way", "single"])
def test_on_a_phone_a_legend_stands_below_the_title_of_its_axis(
    name: str, page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports[name], PHONE)
    found = page.run(LEGENDS)
    assert len(found) >= 4
    assert [(plot, above) for plot, above, _ in found if not 8 <= above <= 24] == []
    assert [(plot, below) for plot, _, below in found if below < 0] == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_rows_are_whole_pixels_high_so_that_the_rules_of_the_fixed_column_meet_the_others(
    size: tuple[int, int], page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["under_way"], size)
    heights = "return [...document.querySelectorAll('.sortable tr')].map((row) => row.getBoundingClientRect().height)"
    found = page.run(heights)
    assert len(found) >= 10
    assert [height for height in found if height % 4] == []


def test_paper_has_the_whole_table_all_figures_and_no_controls(
    page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["under_way"])
    page.resize(PAPER)
    page.command("Emulation.setEmulatedMedia", media="print")
    page.wait("return [...document.querySelectorAll('details')].every((d) => d.open)")
    assert not page.driver.find_element("id", "results-filter").is_displayed()
    assert not page.driver.find_element("id", "results").is_displayed()
    halves = "return [...document.querySelectorAll('.half')].map((table) => {}).flat()"
    shown = "[...table.tHead.rows[1].cells].map((head) => head.innerText.trim()).join()"
    columns = [column.title for column in COLUMNS]
    assert page.run(halves.format(shown)) == [
        ",".join(columns[:7]),
        ",".join(["variant", *columns[7:]]),
    ]
    widths = "table.tBodies[0].rows[1].cells.length, table.getBoundingClientRect().right"
    assert page.run(halves.format(f"[{widths}]"))[::2] == [7, 11]
    assert max(page.run(halves.format(f"[{widths}]"))) <= PAPER[0]
    sizes = "return getComputedStyle(document.querySelector('.half td')).fontSize"
    assert page.run(sizes) == "12px"  # 9 points
    lines = (
        "return [...document.querySelectorAll('.half td small')]"
        ".filter((e) => e.getClientRects().length > 1).length"
    )
    assert page.run(lines) == 0
    right = (
        "return Math.max(...[...document.querySelectorAll('.main-svg')]"
        ".map((e) => e.getBoundingClientRect().right))"
    )
    assert page.run(right) <= PAPER[0]
    page.shot("under_way-print")
    page.command("Emulation.setEmulatedMedia", media="")
    page.wait("return ![...document.querySelectorAll('details')].some((d) => d.open)")
    assert page.run("return document.querySelectorAll('.half').length") == 0
    assert page.driver.find_element("id", "results").is_displayed()
    printed = base64.b64decode(page.command("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert printed.startswith(b"%PDF")
    (page.shots / "under_way.pdf").write_bytes(printed)


BACKGROUND = "return getComputedStyle(document.body).backgroundColor"
SMOOTHED = """
const figure = [...document.querySelectorAll("[id^=plot-]")]
  .find((one) => one.data && one.data.some((trace) => trace.opacity === 0.28));
if (!figure) return null;
const at = figure.data.findIndex((trace) => trace.opacity === 0.28);
return [figure.data[at].y, figure.data[at + 1].y];
"""


def test_the_page_is_dark_where_the_system_asks_and_where_the_button_says(
    page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["single"])
    light = page.run(BACKGROUND)
    page.command(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    dark = page.run(BACKGROUND)
    assert dark != light
    page.run("document.getElementById('theme').click()")
    assert page.run(BACKGROUND) == light
    page.command("Emulation.setEmulatedMedia", features=[])
    page.run("document.getElementById('theme').click()")
    assert page.run(BACKGROUND) == dark


def test_smoothing_is_the_average_that_the_page_states(
    page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["single"])
    set_to = "const s = document.getElementById('smoothing'); s.value = '{}'; s.dispatchEvent(new Event('input'));"
    page.run(set_to.format("0.5"))
    raw, smooth = page.wait(SMOOTHED)
    expected = []
    for index in range(len(raw)):
        weights = [0.5**k for k in range(index + 1)]
        terms = [weight * raw[index - k] for k, weight in enumerate(weights)]
        expected.append(sum(terms) / sum(weights))
    assert smooth == pytest.approx(expected)
    page.run(set_to.format("0"))
    page.wait(f"return !(() => {{ {SMOOTHED} }})()")


def test_a_run_opens_with_its_loss_bits_balance_and_speed(
    page: Page, reports: dict[str, Path]
) -> None:
    page.open(reports["single"])
    text = page.run("return document.body.innerText")
    places = [text.lower().index(words) for words in ("validation loss", "bits per byte", "tokens")]
    assert places == sorted(places)
