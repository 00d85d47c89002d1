"""Curves and packed loads: what they keep of the logged values."""

import base64
from pathlib import Path

import numpy as np
import pytest

from core.reports import experts as packing
from core.reports.curves import POINTS, SMOOTH, curve, paired
from core.reports.study_files import Run, read
from core.reports.style import DASHES, styles, with_line_breaks

from .synthetic import Made, write_sweep

pd = pytest.importorskip("pandas", reason="the extra `report` is not installed")


def run_of(values: list[float], seed: int = 0) -> Run:
    """A run whose column `y` has these values."""
    frame = pd.DataFrame({"tokens": np.arange(1.0, len(values) + 1), "y": values})
    return Run("a", seed, Path(), "done", metrics=frame)


def test_a_short_curve_is_the_values_themselves() -> None:
    found = curve([run_of([3.0, 2.0, 1.0])], "y", axis="tokens", end=3)
    assert found is not None
    assert (found.x, found.mean, found.every) == ([1, 2, 3], [3, 2, 1], 1)


def test_a_long_curve_is_means_of_equal_parts_and_ends_where_the_run_does() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    found = curve([run_of(list(values))], "y", axis="tokens", end=5000)
    assert found is not None
    assert len(found.x) == POINTS
    assert (found.x[-1], found.every) == (5000, 13)
    assert np.mean(found.mean) == pytest.approx(values.mean(), abs=0.01)
    assert found.mean[0] == pytest.approx(
        values[:12].mean(), rel=1e-3
    )  # of tokens 1 to 12: 12.5 are a part


def test_a_band_is_mean_lowest_and_highest_over_seeds() -> None:
    found = curve(
        [run_of([1.0, 4.0]), run_of([2.0, 5.0], 1), run_of([6.0, 6.0], 2)],
        "y",
        axis="tokens",
        end=2,
    )
    assert found is not None
    assert (found.mean, found.low, found.high, found.seeds) == ([3, 5], [1, 4], [6, 6], [3, 3])


def test_a_paired_difference_is_of_equal_parts_seed_by_seed() -> None:
    """The noise of the batches of a seed cancels; each part is the mean of 5 of 200 steps."""
    draws = np.random.default_rng(0)
    batches, trend = draws.normal(0, 1, (3, 200)), np.linspace(0, -0.4, 200)
    pairs = [
        (run_of(list(batches[seed] + trend + 0.01 * seed), seed), run_of(list(batches[seed]), seed))
        for seed in range(3)
    ]
    found = paired(pairs, "y", axis="tokens", end=200)
    assert found is not None
    parts = (np.arange(1, 201) / 200 * SMOOTH).clip(max=SMOOTH - 1).astype(int)
    slow = [trend[parts == part].mean() for part in range(SMOOTH)]
    assert (len(found.x), found.x[-1], set(found.seeds)) == (SMOOTH, 200, {3})
    for values, above in ((found.low, 0.0), (found.mean, 0.01), (found.high, 0.02)):
        assert values == pytest.approx(np.add(slow, above), abs=1e-5)


def test_a_pair_is_held_together_only_where_both_have_values() -> None:
    longer, shorter = run_of([1.0] * 200), run_of([0.25] * 100)
    found = paired([(longer, shorter)], "y", axis="tokens", end=200)
    assert found is not None
    assert (set(found.mean), found.x[-1]) == ({0.75}, 100)
    assert paired([(longer, run_of([float("nan")] * 9))], "y", axis="tokens", end=200) is None
    assert paired([], "y", axis="tokens", end=200) is None


def test_values_that_are_no_numbers_are_left_out() -> None:
    found = curve([run_of([1.0, float("nan"), 3.0])], "y", axis="tokens", end=3)
    assert found is not None
    assert (found.x, found.mean) == ([1, 3], [1, 3])
    assert curve([run_of([float("nan")] * 3)], "y", axis="tokens", end=3) is None


def test_a_validation_stands_at_the_tokens_of_its_step(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(24)}, [0])
    found = curve(read(tmp_path / "s").runs, "val_loss", axis="tokens", end=24 * 2048)
    assert found is not None
    assert found.x == [2048.0 * step for step in range(2, 25, 2)]


def unpacked(packed: dict[str, object]) -> np.ndarray:
    """The values as the page's script unpacks them."""
    integers = np.frombuffer(base64.b64decode(str(packed["data"])), "<u2")
    return float(packed["low"]) + float(packed["step"]) * integers  # type: ignore[arg-type]


def test_packed_values_are_those_within_a_65535th_of_their_range() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5))
    assert np.abs(unpacked(packing.pack(values)) - values.ravel()).max() <= np.ptp(values) / 65535
    assert unpacked(packing.pack(np.full((2, 2), 3.5))).tolist() == [3.5] * 4
    assert unpacked(packing.pack(np.array([np.nan, 2.0]))).tolist() == [2.0, 2.0]


def test_one_token_of_many_is_not_nothing() -> None:
    assert unpacked(packing.pack(np.array([0.0, 1e-7, 16.0])))[:2].astype(bool).tolist() == [
        False,
        True,
    ]


def test_a_load_is_reported_over_its_layers_mean(tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", {"a": Made(300, snapshots=200)}, [0])
    (run,) = packing.experts(read(tmp_path / "s")).runs
    assert [layer["name"] for layer in run["layers"]] == [
        "blocks.1",
        "blocks.2",
        "blocks.3",
        "heads.mtp.depths.0.block",
    ]
    assert len(run["steps"]) == 100
    assert run["steps"][-1] == 300
    loads = unpacked(run["layers"][0]["load"]).reshape(100, 16)
    assert loads.mean(axis=1) == pytest.approx(1.0, abs=1e-3)


def test_loads_above_the_limit_leave_out_later_seeds_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path / "s", {"a": Made(40), "b": Made(40)}, [0, 1, 2])
    monkeypatch.setattr(packing, "VALUES", 2 * 128 * 10)  # a snapshot of a run has 128 values
    found = packing.experts(read(tmp_path / "s"))
    assert [run["label"] for run in found.runs] == ["a, seed 0", "b, seed 0"]
    assert found.note == "4 runs are left out to keep this file small."
    assert [len(run["steps"]) for run in found.runs] == [10, 10]


def test_no_two_of_many_variants_look_alike() -> None:
    looks = styles([f"v{i}" for i in range(63)], "v5")
    assert len(set(looks.values())) == 63
    assert [name for name, look in looks.items() if look.colour == "#000000"] == ["v5"]


def lightness(colour: str) -> float:
    """CIE L* of an sRGB colour, 0 to 100."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_two_of_one_dash_differ_in_lightness_too() -> None:
    """On grey paper little more than the dash of a line is left; lines of the same dash differ in lightness."""
    looks = list(styles([f"v{i}" for i in range(2 * len(DASHES) + 1)], "v0").values())
    pairs = [(a, b) for i, a in enumerate(looks) for b in looks[i + 1 :] if a.dash == b.dash]
    assert [
        (a.colour, b.colour)
        for a, b in pairs
        if abs(lightness(a.colour) - lightness(b.colour)) < 20
    ] == []
    assert [
        look.colour for look in looks if lightness(look.colour) > 65
    ] == []  # white paper swallows what is lighter


def test_a_long_name_is_broken_and_loses_nothing() -> None:
    name = "expert_choice+router.top_k=2+" + "x" * 40
    assert with_line_breaks(name).replace("<br>", "") == name
    assert max(map(len, with_line_breaks(name).split("<br>"))) <= 19
