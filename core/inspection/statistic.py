"""What characterises an expert: log-odds of its tokens, entropies, and the experts that it works with."""

import numpy as np
from numpy.typing import NDArray

from core.inspection.counts import Integers

Floats = NDArray[np.float64]

PRIOR = 1000.0
"""Pseudo-assignments of the prior, spread over token ids as the layer's assignments are."""


def log_odds(own_V: Integers, all_V: Integers, prior: float = PRIOR) -> Floats:
    """The z-score of each token id: its log-odds in one expert against the layer's other experts.

    The informative Dirichlet prior of Monroe, Colaresi and Quinn ("Fightin' Words", Political Analysis 16, 2008,
    eq. 16, 20 and 22) has the layer's own distribution and the weight of `prior` assignments. So rare tokens and
    those that are frequent everywhere have scores near 0.

    Args:
        own_V: assignments of each token id to the expert.
        all_V: the same to all experts of the layer.
        prior: the sum of the prior's pseudo-counts.
    """
    total = all_V.sum()
    prior_V = prior * all_V / max(total, 1)
    other_V = all_V - own_V
    own_with_V = own_V + prior_V
    other_with_V = other_V + prior_V
    own_sum = own_V.sum() + prior
    other_sum = other_V.sum() + prior
    seen_V = all_V > 0
    z_V = np.zeros(len(all_V))
    own = own_with_V[seen_V]
    other = other_with_V[seen_V]
    difference = np.log(own / (own_sum - own + 1e-12)) - np.log(other / (other_sum - other + 1e-12))
    z_V[seen_V] = difference / np.sqrt(1 / own + 1 / other)
    return z_V


def entropy_bits(counts: Integers) -> float:
    """The entropy in bits of the distribution that counts give; 0 without any."""
    total = counts.sum()
    if not total:
        return 0.0
    share = counts[counts > 0] / total
    return float(-(share * np.log2(share)).sum()) + 0.0


def divergence_bits(own_V: Integers, all_V: Integers) -> float:
    """The Kullback-Leibler divergence in bits of an expert's tokens from the layer's; 0 without any."""
    if not own_V.sum():
        return 0.0
    used_V = own_V > 0
    own = own_V[used_V] / own_V.sum()
    everywhere = all_V[used_V] / all_V.sum()
    return max(0.0, float((own * np.log2(own / everywhere)).sum()))


def chance_bits(size: int, all_V: Integers, seed: int) -> float:
    """The divergence of an expert that reads `size` tokens drawn from the layer's: what chance alone gives.

    The divergence of counts is never below 0, and large where they are few, so that it means nothing by itself.
    """
    if not size:
        return 0.0
    used_V = all_V[all_V > 0]
    drawn = np.random.default_rng(seed).multinomial(size, used_V / used_V.sum())
    return divergence_bits(drawn.astype(np.int64), used_V)


def expected_together(together_EE: Integers) -> Floats:
    """The tokens that two experts would share if they were independent, E x E, with as many pairs as there are.

    It is n_i n_j times a constant, which makes the sum over all pairs of two experts that of the counts: a router
    with K choices forms K (K - 1) of them for each token, whatever it has learned.
    """
    load_E = np.diagonal(together_EE).astype(np.float64)
    product_EE = load_E[:, None] * load_E
    np.fill_diagonal(product_EE, 0.0)
    pairs = float(together_EE.sum() - np.trace(together_EE))
    total = float(product_EE.sum())
    result: Floats = product_EE * (pairs / total if total else 0.0)
    return result
