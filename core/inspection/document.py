"""The JSON document of an inspection: everything that the page shows, with documented keys (docs/inspect.md)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.generation.run_tokenizer import RunTokenizer
from core.inspection.counts import Counts, Integers, LayerCounts
from core.inspection.statistic import (
    chance_bits,
    divergence_bits,
    entropy_bits,
    expected_together,
    log_odds,
)

SCHEMA = 1
"""The version of the document; it rises when a key changes its meaning or is removed."""

STATISTIC = (
    "z-score of the log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008)"
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything a document has.

    Args:
        tokens: characteristic tokens of an expert.
        partners: other experts that it works with most and least.
        contexts: places of the text where it is the first expert.
        text: tokens of the text with their experts.
        least: assignments that a characteristic token has at least.
    """

    tokens: int = 16
    partners: int = 4
    contexts: int = 4
    text: int = 3000
    least: int = 3


class Strings:
    """The text of single tokens and of spans."""

    def __init__(self, tokenizer: RunTokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}
        self.boundaries = [tokenizer.markers.begin, tokenizer.markers.end]

    def one(self, token: int) -> str:
        """The text of a token; its number in brackets where it has none, as a marker or a part of a character."""
        if token not in self.known:
            text = self.tokenizer.decode([token])
            self.known[token] = text if text and "\ufffd" not in text else f"[{token}]"
        return self.known[token]

    def before(self, ids: Integers) -> str:
        """The text of the last of some neighbouring tokens: those that belong to one document."""
        ends = np.flatnonzero(np.isin(ids, self.boundaries))
        return self.span(ids[ends[-1] + 1 :] if len(ends) else ids)

    def after(self, ids: Integers) -> str:
        """The text of the first of some neighbouring tokens: those that belong to one document."""
        ends = np.flatnonzero(np.isin(ids, self.boundaries))
        return self.span(ids[: ends[0]] if len(ends) else ids)

    def span(self, ids: Integers) -> str:
        """The text of neighbouring tokens."""
        return self.tokenizer.decode([int(token) for token in ids])


def document(
    name: str, checkpoint: str, text: dict[str, Any], counts: Counts, strings: Strings, sizes: Sizes
) -> dict[str, Any]:
    """The document of one checkpoint.

    Args:
        name: the run.
        checkpoint: its checkpoint.
        text: what was read.
        counts: who went where.
        strings: the text of tokens.
        sizes: how much of everything is kept.
    """
    ids = np.concatenate(counts.ids)
    layers = []
    for path, layer in counts.layers.items():
        layers.append(_layer(path, layer, ids, strings, sizes))
    attention = []
    for path in sorted({*counts.max_logits, *(path for path, _ in counts.latents)}):
        latents = {}
        for (owner, latent), (total, count) in counts.latents.items():
            if owner == path:
                latents[latent] = float(np.sqrt(total / max(count, 1)))
        attention.append(
            {"path": path, "max_logit": counts.max_logits.get(path), "latent_rms": latents}
        )
    first = {}
    for path, layer in counts.layers.items():
        first[path] = np.concatenate(layer.first)[: sizes.text].tolist()
    shown = [int(token) for token in ids[: sizes.text]]
    return {
        "schema": SCHEMA,
        "run": name,
        "checkpoint": checkpoint,
        "statistic": STATISTIC,
        "text": {**text, "tokens": len(ids), "sources": list(counts.sources)},
        "layers": layers,
        "attention": attention,
        "reading": {"ids": shown, "tokens": list(map(strings.one, shown)), "first": first},
    }


def _layer(
    path: str, layer: LayerCounts, ids: Integers, strings: Strings, sizes: Sizes
) -> dict[str, Any]:
    """One layer with experts."""
    load_E = layer.load
    total = int(load_E.sum())
    all_V = layer.assigned_EV.sum(axis=0)
    expected_EE = expected_together(layer.together_EE)
    first_T = np.concatenate(layer.first)
    experts = []
    for index in range(layer.experts):
        own_V = layer.assigned_EV[index]
        load = int(load_E[index])
        experts.append(
            {
                "load": load,
                "share": load / max(total, 1),
                "by_source": layer.assigned_ES[index].tolist(),
                "entropy_bits": entropy_bits(own_V),
                "divergence_bits": divergence_bits(own_V, all_V),
                "chance_bits": chance_bits(load, all_V, index),
                "tokens": _tokens(own_V, all_V, strings, sizes),
                "together": _together(index, layer.together_EE, expected_EE, sizes),
                "contexts": _contexts(index, own_V, all_V, ids, first_T, strings, sizes),
            }
        )
    even = np.log2(layer.experts) if layer.experts > 1 else 1.0
    mean = total / layer.experts
    return {
        "path": path,
        "tokens": layer.tokens,
        "assignments": total,
        "dropped": layer.dropped,
        "load_entropy": entropy_bits(load_E) / float(even),
        "max_over_mean": float(load_E.max() / mean) if total else 0.0,
        "token_entropy_bits": entropy_bits(all_V),
        "by_source": layer.assigned_ES.sum(axis=0).tolist(),
        "experts": experts,
    }


def _tokens(
    own_V: Integers, all_V: Integers, strings: Strings, sizes: Sizes
) -> list[dict[str, Any]]:
    """The most characteristic tokens of an expert, best first."""
    z_V = log_odds(own_V, all_V)
    z_V[own_V < sizes.least] = -np.inf
    found = []
    for token in np.argsort(-z_V, kind="stable")[: sizes.tokens]:
        if not z_V[token] > 0:
            break
        count = int(own_V[token])
        found.append(
            {
                "id": int(token),
                "text": strings.one(int(token)),
                "z": float(z_V[token]),
                "count": count,
                "share_of_expert": count / int(own_V.sum()),
                "share_of_token": count / int(all_V[token]),
            }
        )
    return found


def _together(
    index: int, together_EE: Integers, expected_EE: Any, sizes: Sizes
) -> list[dict[str, Any]]:
    """The experts that an expert shares most tokens with, against independence, and those with fewest."""
    others = [e for e in range(len(together_EE)) if e != index and expected_EE[index, e] > 0]
    others.sort(key=lambda e: -together_EE[index, e] / expected_EE[index, e])
    if len(others) > 2 * sizes.partners:
        others = others[: sizes.partners] + others[len(others) - sizes.partners :]
    found = []
    for other in others:
        count = int(together_EE[index, other])
        found.append(
            {"expert": other, "count": count, "expected": float(expected_EE[index, other])}
        )
    return found


def _contexts(
    index: int,
    own_V: Integers,
    all_V: Integers,
    ids: Integers,
    first_T: Integers,
    strings: Strings,
    sizes: Sizes,
    reach: int = 8,
) -> list[dict[str, str]]:
    """Places of the text where an expert is first, of different tokens, the most characteristic first."""
    places = np.flatnonzero(first_T == index)
    if not len(places) or not sizes.contexts:
        return []
    tokens, where = np.unique(ids[places], return_index=True)
    order = np.argsort(-log_odds(own_V, all_V)[tokens], kind="stable")
    found = []
    for place in places[where[order[: sizes.contexts]]]:
        before = strings.before(ids[max(0, place - reach) : place])
        after = strings.after(ids[place + 1 : place + 1 + reach])
        token = strings.one(int(ids[place]))
        found.append({"before": before, "token": token, "after": after})
    return found


def moved(before: Counts, after: Counts) -> list[dict[str, Any]]:
    """What differs between two checkpoints that have read the same tokens, for each layer that both have.

    Experts are compared by their numbers: in two runs that do not share their beginning these mean nothing.
    """
    found = []
    for path, old in before.layers.items():
        new = after.layers.get(path)
        if new is None or new.experts != old.experts:
            continue
        first_T = np.concatenate(old.first)
        then_T = np.concatenate(new.first)
        read_T = (first_T >= 0) & (then_T >= 0)
        flows = np.zeros((old.experts, old.experts), dtype=np.int64)
        np.add.at(flows, (first_T[read_T], then_T[read_T]), 1)
        total = int(flows.sum())
        experts = []
        for index in range(old.experts):
            experts.append(
                {
                    "load": [int(old.load[index]), int(new.load[index])],
                    "first": int(flows[index].sum()),
                    "stayed": int(flows[index, index]),
                    "went_to": _went_to(flows[index], index),
                    "token_distance_bits": _distance(
                        old.assigned_EV[index], new.assigned_EV[index]
                    ),
                }
            )
        found.append(
            {
                "path": path,
                "first": total,
                "stayed": int(np.trace(flows)),
                "experts": experts,
            }
        )
    return found


def _went_to(flow_E: Integers, index: int, most: int = 3) -> list[list[int]]:
    """The experts that took over most of an expert's tokens, each with their number."""
    order = [int(e) for e in np.argsort(-flow_E, kind="stable") if e != index and flow_E[e]]
    return [[other, int(flow_E[other])] for other in order[:most]]


def _distance(old_V: Integers, new_V: Integers) -> float | None:
    """The Jensen-Shannon divergence in bits of two distributions of tokens, 0 to 1; None if one is empty."""
    if not old_V.sum() or not new_V.sum():
        return None
    p = old_V / old_V.sum()
    q = new_V / new_V.sum()
    mean = (p + q) / 2
    total = 0.0
    for one in (p, q):
        used = one > 0
        total += float((one[used] * np.log2(one[used] / mean[used])).sum()) / 2
    return min(1.0, max(0.0, total))
