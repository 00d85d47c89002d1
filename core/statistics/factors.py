"""Effects of the factors of a grid: a fixed-effects model of its cells with seeds as blocks.

The value of a run in cell c with seed s is y = m_c + b_s + e, with independent errors e of one variance. Least squares
estimates the cells' means m and the blocks' effects b, which sum to 0. What a seed does to all cells alike is in b and
cancels. The residual mean square s^2 = SSE / (n - cells - seeds + 1) is the variance of a run's error.

- The *effect* of a level is the mean of its cells' m minus the mean of all cells' m, each cell with equal weight.
- The *interaction* of two levels is the mean of their cells minus both levels' means plus the mean of all.
- Both are linear forms l'm, with the interval l'm +- t(0.975, df) s sqrt(l'(X'X)^-1 l).
- A factor is tested by F = (Lm)' (L (X'X)^-1 L')^-1 (Lm) / (q s^2), where L holds q independent ones of its forms; an
  interaction likewise.

In a balanced grid these are the sums of squares of the randomized complete block design with a factorial treatment
structure (Montgomery, Design and Analysis of Experiments, 5.6). With lost runs they are the tests of hypotheses on
unweighted means (Searle, Linear Models, chapter 8), often called type III.

If a cell has no run at all, an interaction cannot be estimated, and the mean over a level's cells would depend on which
cells exist. Then the *additive* model y = m + sum of the levels' effects + b_s + e is fitted, and its lack of fit is
tested against the residual of the cells' model (Draper and Smith, Applied Regression Analysis, 2.1).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from math import prod
from typing import Any

from core.statistics.comparison import LEVEL, ROUNDING

Cell = tuple[Hashable, ...]
"""A level of each factor, in the order of the factors."""


@dataclass(frozen=True)
class Effect:
    """The effect of one level, or of two together.

    Args:
        levels: the level, or the two.
        mean: the estimated mean over their cells; None in the additive model.
        effect: how far it lies from the mean of all cells; for two levels, from what both effects add up to.
        low, high: its interval; None without a degree of freedom.
    """

    levels: tuple[Hashable, ...]
    mean: float | None
    effect: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Term:
    """A factor, or the interaction of two.

    Args:
        factors: the indices of its factors.
        effects: one for each level, or pair of levels.
        f, p: the F test that all effects are 0; None without degrees of freedom, or if nothing varies.
        df: the numerator's degrees of freedom.
    """

    factors: tuple[int, ...]
    effects: list[Effect]
    f: float | None
    p: float | None
    df: int


@dataclass(frozen=True)
class LackOfFit:
    """The F test of the additive model against one with a mean for each cell."""

    f: float
    p: float
    df: int


@dataclass(frozen=True)
class Factorial:
    """The fitted model.

    Args:
        complete: whether every combination of levels has a run; if not, the model is additive.
        terms: the factors, then the interactions of two, if `complete`.
        runs, seeds, cells: how many there are.
        df: degrees of freedom of the residual.
        residual_sd: the standard deviation of a run's error; None without a degree of freedom.
        lack_of_fit: the test of the additive model; None if `complete`, or where it has no degrees of freedom.
    """

    complete: bool
    terms: list[Term]
    runs: int
    seeds: int
    cells: int
    df: int
    residual_sd: float | None
    lack_of_fit: LackOfFit | None = None


@dataclass
class _Fit:
    """Least squares of a design matrix.

    Args:
        x: runs x parameters, of full rank.
        y: the values.
    """

    x: Any
    y: Any
    beta: Any = field(init=False)
    covariance: Any = field(init=False)
    sse: float = field(init=False)
    df: int = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np

        self.beta = np.linalg.lstsq(self.x, self.y, rcond=None)[0]
        self.covariance = np.linalg.inv(self.x.T @ self.x)
        residual = self.y - self.x @ self.beta
        self.sse = float(residual @ residual)
        self.df = self.x.shape[0] - self.x.shape[1]
        if self.sse <= len(self.y) * (ROUNDING * float(np.abs(self.y).max())) ** 2:
            self.sse = 0.0  # nothing but rounding

    @property
    def variance(self) -> float | None:
        """The residual mean square; None without a degree of freedom."""
        return self.sse / self.df if self.df > 0 else None

    def effect(self, levels: Cell, form: Any, mean: float | None) -> Effect:
        """A linear form of the parameters with its interval."""
        from scipy import stats

        value = float(form @ self.beta)
        if self.variance is None:
            return Effect(levels, mean, value, None, None)
        spread = (self.variance * float(form @ self.covariance @ form)) ** 0.5
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.df)) * spread
        return Effect(levels, mean, value, value - half, value + half)

    def test(self, forms: Any) -> tuple[float | None, float | None, int]:
        """F, p and degrees of freedom of the hypothesis that all linear forms are 0."""
        import numpy as np
        from scipy import stats

        q = int(np.linalg.matrix_rank(forms))
        if not self.variance:
            return None, None, q
        value = forms @ self.beta
        inner = np.linalg.pinv(forms @ self.covariance @ forms.T, hermitian=True)
        f = float(value @ inner @ value) / (q * self.variance)
        return f, float(stats.f.sf(f, q, self.df)), q


def factorial(
    runs: Mapping[Cell, Mapping[int, float]], levels: Sequence[Sequence[Hashable]]
) -> Factorial | str:
    """Fits the model to the runs of a grid.

    Args:
        runs: the metric by cell and seed; a cell without a run may be absent.
        levels: the levels of each factor, at least two of each of at least two factors.

    Returns:
        The model, or a sentence that says why there is none.
    """
    import numpy as np

    known = {cell: own for cell, own in runs.items() if own}
    if len(known) < 2:
        return "fewer than two points of the grid have a finished run"
    for index, own_levels in enumerate(levels):
        for level in own_levels:
            if not any(cell[index] == level for cell in known):
                return f"no finished run has {level}"
    cells = list(known)
    seeds = sorted({seed for own in known.values() for seed in own})
    rows = [(cell, seed) for cell in cells for seed in seeds if seed in known[cell]]
    y = np.array([known[cell][seed] for cell, seed in rows])
    blocks = _blocks([seed for _, seed in rows], seeds)
    of_cell = np.array([[float(cell == one) for one in cells] for cell, _ in rows])
    x = np.hstack([of_cell, blocks])
    unconnected = "too few runs are finished to separate the points of the grid from the seeds"
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return unconnected
    by_cell = _Fit(x, y)
    counts = (len(y), len(seeds), len(cells))
    if len(cells) == prod(len(own) for own in levels):
        terms = _cell_terms(by_cell, cells, levels)
        return _result(True, terms, counts, by_cell)
    coded = np.array([_coded(cell, levels) for cell, _ in rows])
    x = np.hstack([np.ones((len(y), 1)), coded, blocks])
    if np.linalg.matrix_rank(x) < x.shape[1]:
        return "so many points are missing that the factors cannot be separated from each other"
    additive = _Fit(x, y)
    return _result(
        False, _additive_terms(additive, levels), counts, additive, _lack(additive, by_cell)
    )


def _result(
    complete: bool,
    terms: list[Term],
    counts: tuple[int, int, int],
    fit: _Fit,
    lack_of_fit: LackOfFit | None = None,
) -> Factorial:
    variance = fit.variance
    sd = None if variance is None else variance**0.5
    return Factorial(complete, terms, *counts, fit.df, sd, lack_of_fit)


def _lack(additive: _Fit, by_cell: _Fit) -> LackOfFit | None:
    """The test of the additive model; None if it fits every cell, or the cells have no residual."""
    from scipy import stats

    df = additive.df - by_cell.df
    if df < 1 or not by_cell.variance:
        return None
    f = max(0.0, additive.sse - by_cell.sse) / df / by_cell.variance
    return LackOfFit(f, float(stats.f.sf(f, df, by_cell.df)), df)


def _blocks(seeds: Sequence[int], known: Sequence[int]) -> Any:
    """The columns of the seeds' effects, which sum to 0: one fewer than there are seeds."""
    import numpy as np

    columns = np.zeros((len(seeds), len(known) - 1))
    for row, seed in enumerate(seeds):
        at = known.index(seed)
        if at == len(known) - 1:
            columns[row] = -1.0
        else:
            columns[row, at] = 1.0
    return columns


def _coded(cell: Cell, levels: Sequence[Sequence[Hashable]]) -> list[float]:
    """The columns of a cell's levels, whose effects sum to 0 for each factor."""
    row: list[float] = []
    for level, own in zip(cell, levels, strict=True):
        at = list(own).index(level)
        last = len(own) - 1
        row += [-1.0 if at == last else float(at == column) for column in range(last)]
    return row


def _cell_terms(
    fit: _Fit, cells: Sequence[Cell], levels: Sequence[Sequence[Hashable]]
) -> list[Term]:
    """The factors and their interactions as linear forms of the cells' means."""
    import numpy as np

    def mean_of(chosen: Mapping[int, Hashable]) -> Any:
        form = np.zeros(fit.x.shape[1])
        own = [i for i, cell in enumerate(cells) if all(cell[f] == v for f, v in chosen.items())]
        form[own] = 1.0 / len(own)
        return form

    def term(factors: tuple[int, ...]) -> Term:
        forms = []
        effects = []
        for chosen in product(*(levels[factor] for factor in factors)):
            at = dict(zip(factors, chosen, strict=True))
            mean = mean_of(at)
            form = mean - mean_of({})
            if len(factors) == 2:
                form = mean + mean_of({})
                for factor, level in at.items():
                    form = form - mean_of({factor: level})
            forms.append(form)
            effects.append(fit.effect(chosen, form, float(mean @ fit.beta)))
        return Term(factors, effects, *fit.test(np.array(forms)))

    count = range(len(levels))
    return [term((index,)) for index in count] + [term(pair) for pair in combinations(count, 2)]


def _additive_terms(fit: _Fit, levels: Sequence[Sequence[Hashable]]) -> list[Term]:
    """The factors as parameters of the additive model."""
    import numpy as np

    terms = []
    at = 1  # after the mean
    for index, own in enumerate(levels):
        width = len(own) - 1
        columns = np.zeros((len(own), fit.x.shape[1]))
        columns[:width, at : at + width] = np.eye(width)
        columns[width, at : at + width] = -1.0
        effects = [
            fit.effect((level,), form, None) for level, form in zip(own, columns, strict=True)
        ]
        terms.append(Term((index,), effects, *fit.test(columns)))
        at += width
    return terms
