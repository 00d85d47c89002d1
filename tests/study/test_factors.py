"""The factor view against textbook sums of squares and a slow solution of the normal equations in fractions."""

import random
from fractions import Fraction
from itertools import product
from statistics import mean

import pytest

from core.statistics.comparison import paired
from core.statistics.factors import Factorial, Term, factorial
from core.study.factor_view import factor_view
from core.study.sweep_file import Sweep, read_sweep

from .conftest import Write

pytest.importorskip("scipy", reason="scipy is not installed: no factor view was computed")
from scipy import stats

A = ["a1", "a2", "a3"]
B = ["b1", "b2"]
SEEDS = [0, 1, 2, 3]
Runs = dict[tuple[str, ...], dict[int, float]]


def made(seed: int = 1, sd: float = 0.1, interaction: float = 0.5) -> Runs:
    """Values of a 3 x 2 grid with four seeds, an effect of each factor and of the seeds, and an interaction."""
    draws = random.Random(seed)
    found: Runs = {}
    for (i, a), (j, b) in product(enumerate(A), enumerate(B)):
        found[a, b] = {
            s: 4 + 0.3 * i - 0.2 * j + interaction * i * j + 0.7 * s + sd * draws.gauss(0, 1)
            for s in SEEDS
        }
    return found


def fitted(runs: Runs, levels: list[list[str]] | None = None) -> Factorial:
    """The model of the runs."""
    found = factorial(runs, levels or [A, B])
    assert isinstance(found, Factorial), found
    return found


def slow(rows: list[list[int]], y: list[float]) -> list[Fraction]:
    """Least squares by Gauss-Jordan elimination of the normal equations, exactly."""
    width = len(rows[0])
    exact = [Fraction(v) for v in y]
    matrix = [
        [sum((Fraction(r[i] * r[j]) for r in rows), Fraction()) for j in range(width)]
        + [sum((r[i] * v for r, v in zip(rows, exact, strict=True)), Fraction())]
        for i in range(width)
    ]
    for i in range(width):
        pivot = next(k for k in range(i, width) if matrix[k][i])
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for k in range(width):
            if k != i:
                factor = matrix[k][i]
                matrix[k] = [u - factor * v for u, v in zip(matrix[k], matrix[i], strict=True)]
    return [row[-1] for row in matrix]


def sse_of(rows: list[list[int]], y: list[float]) -> float:
    """The residual sum of squares, exactly until the end."""
    beta = slow(rows, y)
    total = Fraction()
    for row, value in zip(rows, y, strict=True):
        fit = sum((b * x for b, x in zip(beta, row, strict=True)), Fraction())
        total += (Fraction(value) - fit) ** 2
    return float(total)


def code(level: str, levels: list[str]) -> list[int]:
    """Columns that sum to 0 over the levels."""
    if level == levels[-1]:
        return [-1] * (len(levels) - 1)
    return [int(level == one) for one in levels[:-1]]


def flat(runs: Runs) -> tuple[list[tuple[str, str, int]], list[float]]:
    """The runs in a list, and their values."""
    keys = [(*cell, s) for cell, own in runs.items() for s in own]
    return keys, [runs[a, b][s] for a, b, s in keys]  # type: ignore[misc, return-value]


def design(keys: list[tuple[str, str, int]], terms: str) -> list[list[int]]:
    """Rows of the mean, the seeds, and the terms among `a`, `b` and `*`."""
    rows = []
    for a, b, s in keys:
        row = [1, *code(str(s), [str(one) for one in SEEDS])]
        row += code(a, A) if "a" in terms else []
        row += code(b, B) if "b" in terms else []
        row += [x * z for x in code(a, A) for z in code(b, B)] if "*" in terms else []
        rows.append(row)
    return rows


def test_a_balanced_grid_gives_the_textbook_sums_of_squares() -> None:
    runs = made()
    n = len(SEEDS)
    grand = mean(v for own in runs.values() for v in own.values())
    of_a = {a: mean(v for b in B for v in runs[a, b].values()) for a in A}
    of_b = {b: mean(v for a in A for v in runs[a, b].values()) for b in B}
    of_seed = {s: mean(own[s] for own in runs.values()) for s in SEEDS}
    cell = {key: mean(own.values()) for key, own in runs.items()}
    ss_a = n * len(B) * sum((m - grand) ** 2 for m in of_a.values())
    ss_b = n * len(A) * sum((m - grand) ** 2 for m in of_b.values())
    ss_ab = n * sum((cell[a, b] - of_a[a] - of_b[b] + grand) ** 2 for a in A for b in B)
    sse = sum((runs[key][s] - cell[key] - of_seed[s] + grand) ** 2 for key in runs for s in SEEDS)
    df = (len(runs) - 1) * (n - 1)
    found = fitted(runs)
    assert (found.df, found.runs, found.cells, found.seeds) == (df, 24, 6, n)
    assert found.residual_sd == pytest.approx((sse / df) ** 0.5, rel=1e-9)
    for term, squares, q in zip(found.terms, (ss_a, ss_b, ss_ab), (2, 1, 2), strict=True):
        assert term.df == q
        assert term.f == pytest.approx(squares / q / (sse / df), rel=1e-8)
        assert term.p == pytest.approx(float(stats.f.sf(term.f, q, df)), rel=1e-9)
    half = stats.t.ppf(0.975, df) * (sse / df * (len(A) - 1) / (len(A) * len(B) * n)) ** 0.5
    for effect in found.terms[0].effects:
        (a,) = effect.levels
        assert effect.effect == pytest.approx(of_a[str(a)] - grand, abs=1e-12)
        assert effect.mean == pytest.approx(of_a[str(a)], rel=1e-12)
        assert effect.high is not None
        assert effect.high - effect.effect == pytest.approx(half, rel=1e-9)
    half = half * (len(B) - 1) ** 0.5  # of an interaction: (a - 1)(b - 1) / (a b n)
    for effect in found.terms[2].effects:
        a, b = map(str, effect.levels)
        assert effect.effect == pytest.approx(cell[a, b] - of_a[a] - of_b[b] + grand, abs=1e-12)
        assert effect.low is not None
        assert effect.effect - effect.low == pytest.approx(half, rel=1e-9)


def test_lost_runs_give_the_effects_and_tests_of_the_exact_normal_equations() -> None:
    runs = made(7)
    for cell, seed in ((("a1", "b1"), 0), (("a3", "b2"), 2), (("a2", "b1"), 0)):
        del runs[cell][seed]
    keys, y = flat(runs)
    found = fitted(runs)
    full = sse_of(design(keys, "ab*"), y)
    assert found.df == len(y) - 6 - 3
    assert found.residual_sd == pytest.approx((full / found.df) ** 0.5, rel=1e-9)
    beta = [float(value) for value in slow(design(keys, "ab*"), y)]
    effects = [effect.effect for term in found.terms for effect in term.effects]
    assert effects[:2] == pytest.approx(beta[4:6], abs=1e-10)
    assert effects[3] == pytest.approx(beta[6], abs=1e-10)
    for term, left in zip(found.terms, ("b*", "a*", "ab"), strict=True):
        without = sse_of(design(keys, left), y)
        assert term.f == pytest.approx((without - full) / term.df / (full / found.df), rel=1e-7)


def test_a_grid_with_holes_is_additive_and_says_whether_that_fits() -> None:
    runs = made(3, interaction=0.0)
    del runs["a3", "b2"]
    keys, y = flat(runs)
    found = fitted(runs)
    assert not found.complete
    assert [term.factors for term in found.terms] == [(0,), (1,)]
    additive = sse_of(design(keys, "ab"), y)
    assert found.residual_sd == pytest.approx((additive / found.df) ** 0.5, rel=1e-9)
    beta = [float(value) for value in slow(design(keys, "ab"), y)]
    assert [e.effect for e in found.terms[0].effects][:2] == pytest.approx(beta[4:6], abs=1e-10)
    for term, left in zip(found.terms, ("b", "a"), strict=True):
        without = sse_of(design(keys, left), y)
        f = (without - additive) / term.df / (additive / found.df)
        assert term.f == pytest.approx(f, rel=1e-7)
    of_cells = sum(
        (v - mean(own.values()) - mean(o[s] for o in runs.values()) + mean(y)) ** 2
        for own in runs.values()
        for s, v in own.items()
    )
    assert found.lack_of_fit is not None
    assert found.lack_of_fit.df == 1
    f = (additive - of_cells) / (of_cells / (4 * 3))
    assert found.lack_of_fit.f == pytest.approx(f, rel=1e-7)
    assert found.lack_of_fit.p > 0.05
    bent = made(3, interaction=1.0)
    del bent["a3", "b2"]
    lack = fitted(bent).lack_of_fit
    assert lack is not None
    assert lack.p < 1e-6


def test_two_levels_of_one_factor_are_the_paired_t_test_of_the_seeds() -> None:
    draws = random.Random(5)
    runs: Runs = {}
    for a, b in product(["x", "y"], ["u", "v"]):
        runs[a, b] = {s: draws.gauss(a == "x", 1) + 3 * s for s in range(6)}
    same: Runs = {("x", "u"): runs["x", "u"], ("y", "v"): runs["y", "u"]}
    found = factorial(same, [["x", "y"], ["u", "v"]])
    assert isinstance(found, str)  # both factors change together
    assert "cannot be separated" in found
    one = fitted({(a,): runs[a, "u"] for a in ("x", "y")}, [["x", "y"]])
    test = paired(runs["x", "u"], runs["y", "u"])
    assert test is not None
    assert one.terms[0].p == pytest.approx(test.p, rel=1e-9)
    assert 2 * one.terms[0].effects[1].effect == pytest.approx(test.interval.mean, rel=1e-9)


def test_a_shift_of_a_whole_seed_changes_no_effect() -> None:
    runs = made(2)
    shifted = {cell: {s: v + 100 * s for s, v in own.items()} for cell, own in runs.items()}
    for mine, theirs in zip(fitted(runs).terms, fitted(shifted).terms, strict=True):
        assert mine.f == pytest.approx(theirs.f, rel=1e-6)
        assert [e.low for e in mine.effects] == pytest.approx(
            [e.low for e in theirs.effects], abs=1e-9
        )


def test_too_few_runs_give_no_interval_or_a_reason() -> None:
    runs = made()
    one = fitted({cell: {0: own[0]} for cell, own in runs.items()})
    assert (one.df, one.residual_sd, one.terms[0].p, one.terms[0].effects[0].low) == (
        0,
        None,
        None,
        None,
    )
    apart = {cell: {i: own[0]} for i, (cell, own) in enumerate(runs.items())}
    assert "to separate the points of the grid from the seeds" in str(factorial(apart, [A, B]))
    assert factorial({cell: o for cell, o in runs.items() if cell[1] == "b1"}, [A, B]) == (
        "no finished run has b2"
    )
    flat_runs = {cell: dict.fromkeys(SEEDS, 2.5) for cell in runs}
    assert [term.p for term in fitted(flat_runs).terms] == [None, None, None]


def test_three_factors_have_three_effects_and_three_interactions() -> None:
    draws = random.Random(9)
    levels = [["p", "q"], ["r", "s"], ["t", "u", "v"]]
    runs: Runs = {
        cell: {s: draws.gauss(cell[0] == "p", 0.1) for s in range(3)} for cell in product(*levels)
    }
    found = fitted(runs, levels)
    assert [term.factors for term in found.terms] == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    assert [term.df for term in found.terms] == [1, 1, 2, 1, 2, 2]
    for term in found.terms:
        assert sum(effect.effect for effect in term.effects) == pytest.approx(0, abs=1e-12)


GRID = """\
title: Do depth and rate interact?
base: {base}
seeds: [3, 4, 5]
baseline: a+lr=0.001+depth=1
variants: {{a: {{}}}}
grid: {{optimizer.lr: [0.001, 0.01], model.heads.mtp.depth: [1, 2]}}
budget: {{steps: 2}}
match: {{params: null, flops: null, allow: [loss heads, optimizer and its schedule]}}
"""


def values_of(sweep: Sweep) -> dict[str, dict[int, float]]:
    """A value of each run, with an interaction of the two keys."""
    found: dict[str, dict[int, float]] = {}
    for variant in sweep.variants:
        both = float(variant.point == {"optimizer.lr": 0.01, "model.heads.mtp.depth": 2})
        draws = random.Random(variant.name)
        found[variant.name] = {s: both + 0.01 * draws.gauss(0, 1) for s in sweep.schema.seeds}
    return found


def test_the_view_names_keys_and_values_and_says_that_they_interact(write: Write) -> None:
    sweep = read_sweep(write(GRID))
    view = factor_view(sweep, values_of(sweep))
    assert view is not None
    assert view["factors"] == ["optimizer.lr", "model.heads.mtp.depth"]
    assert [term["factors"] for term in view["terms"]][2] == view["factors"]
    assert [e["values"] for e in view["terms"][2]["effects"]][3] == ["0.01", "2"]
    assert view["terms"][2]["effects"][3]["effect"] == pytest.approx(0.25, abs=0.02)
    assert view["terms"][2]["p_holm"] < 1e-4
    assert any("keys interact" in note for note in view["notes"])
    assert factor_view(sweep, values_of(sweep), censored=True)["missing"]  # type: ignore[index]


def test_a_point_that_is_left_out_takes_the_interaction_from_the_view(write: Write) -> None:
    rule = "skip: [{{when: {{optimizer.lr: 0.01, model.heads.mtp.depth: 2}}, reason: r}}]\n"
    sweep = read_sweep(write(GRID + rule))
    view = factor_view(sweep, values_of(sweep))
    assert view is not None
    assert not view["complete"]
    assert [term["factors"] for term in view["terms"]] == [[name] for name in view["factors"]]
    assert "cannot be estimated" in view["notes"][0]


def test_without_two_keys_that_vary_there_is_no_view(write: Write) -> None:
    one = GRID.replace("[0.001, 0.01]", "[0.001]")
    sweep = read_sweep(write(one))
    assert factor_view(sweep, values_of(sweep)) is None


def test_the_terms_are_what_a_term_promises() -> None:
    term = fitted(made()).terms[0]
    assert isinstance(term, Term)
    assert {effect.levels for effect in term.effects} == {(a,) for a in A}
