"""Growth, start-up and the guard: what is computed from measurements."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
from lab import ROOT

from core.speed.growth_figure import figure
from core.speed.thresholds import THRESHOLDS, complaints


def script(name: str) -> ModuleType:
    """A script of the folder `benchmarks`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def points(exponent: float) -> dict[str, dict[str, float]]:
    """A step that grows as a power of the value on its axis."""
    found = {}
    for value in (8, 16, 64):
        seconds = 0.25 * value**exponent
        found[str(value)] = {
            "seconds": seconds,
            "times_the_first": (value / 8) ** exponent,
            "tokens_per_second": 1 / seconds,
            "flops": 1e9 * value,
            "parameters": 1e6,
        }
    return found


def test_a_slope_is_the_exponent_of_a_power() -> None:
    growth = script("growth")
    assert growth.slope(points(0.5), "seconds") == pytest.approx(0.5)
    lines = growth.table({"axes": {"experts": points(0.5)}})
    assert lines[-1] == "| experts | value^0.50 | value^1.00 |"
    assert lines[2].startswith("| experts | 8 | 0.707 | 1.00 | 1 | 8.0 | 1.00 |")


def test_the_tokens_of_a_step_stay_where_the_length_or_the_micro_batches_grow() -> None:
    growth = script("growth")
    found = growth.axes(quick=False)
    assert list(found["experts"]) == [8, 16, 32, 64, 128, 256]
    for axis in ("length", "micro-batches"):
        tokens = set()
        for shape in found[axis].values():
            values = dict(override.split("=") for override in shape.overrides)
            length = int(values.get("data.sequence_length", 256))
            count = int(values.get("batch.accumulate", 1))
            tokens.add(count * int(values["batch.sequences"]) * length)
        assert len(tokens) == 1


def test_the_figure_is_one_panel_for_each_axis() -> None:
    root = ElementTree.fromstring(figure({"experts": points(0.5), "a < b": points(1.0)}))
    lines = [part for part in root.iter() if part.tag.endswith("polyline")]
    assert len(lines) == 4
    for line in lines:
        places = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        assert len(places) == 3
        assert places == sorted(places)
        heights = [y for _, y in places]
        assert heights == sorted(heights, reverse=True)  # larger values are further up


def test_import_times_are_read_from_python() -> None:
    startup = script("startup")
    printed = (
        "import time:       100 |       2500 |   torch._C\nimport time:  7 |  3000000 | torch\nx\n"
    )
    found = startup.parse_import_times(printed)
    assert found == [("torch._C", 0.0025, 0.0001), ("torch", 3.0, 7e-6)]
    assert startup.by_package(found) == {"torch": pytest.approx(107e-6)}


def test_a_ratio_out_of_its_bounds_has_a_sentence() -> None:
    good = {}
    for name, threshold in THRESHOLDS.items():
        assert (threshold.least is None) != (threshold.most is None)
        good[name] = threshold.least if threshold.least is not None else threshold.most
    assert complaints(good) == []
    (slow,) = complaints({**good, "train": 0.01})
    assert slow.startswith(
        "training at 7 M parameters, ours / the best of transformers fell to 0.01"
    )
    (dear,) = complaints({**good, "experts": 9.0})
    assert "rose to 9.00, above" in dear
    (missing,) = complaints({**good, "decode": None})
    assert "was not measured" in missing


def test_the_page_of_results_is_made_from_the_files(tmp_path: Path) -> None:
    speed_tables = script("speed_tables")
    row = {
        "what": "train",
        "name": "7 M",
        "tokens_per_second": 4000.0,
        "peer": {"best": "eager", "tokens_per_second": 2000.0},
        "ratio": 2.0,
        "interval": [1.9, 2.1],
        "fraction_of_limit": 0.7,
        "memory_ratio": None,
        "no_ratio": None,
        "device_name": "a CPU",
        "threads": 2,
        "versions": {"torch": "2", "transformers": None},
    }
    (tmp_path / "bench.json").write_text(json.dumps([row]))
    made = speed_tables.tables(tmp_path)
    assert "| train | 7 M | 4,000 | 2,000 (eager) | 2.00 (1.90 to 2.10) | 0.70 |  |  |" in made
    page = (ROOT / "records" / "speed" / "README.md").read_text(encoding="utf-8")
    once = speed_tables.with_tables(page, made)
    assert speed_tables.with_tables(once, made) == once
    assert once.count("| train | 7 M |") == 1
