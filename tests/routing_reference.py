"""Every routing strategy and every balancing loss as slow, simple code: one token and one expert at a time, in fp64.

Written from the papers, independently of the plugins: DeepSeek-V3's report (arXiv 2412.19437), DeepSeek-V2
(2405.04434, eq. 20-31 and section 2.2.4), GShard (2006.16668, algorithm 1), DeepSeekMoE (2401.06066, eq. 3-5), Switch
(2101.03961), Expert Choice (2202.09368), ST-MoE (2202.08906), Hash Layers (2106.04426) and 2408.15664 (selection bias).
Random numbers are arguments. Whatever is chosen is a plain number, so gradients flow through gates and shares alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

Rows = Sequence[Tensor]  # one vector over the experts for each token


@dataclass(frozen=True)
class Assigned:
    """One token at one expert."""

    token: int
    expert: int
    gate: Tensor
    kept: bool = True


def softmax(logits: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j)."""
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def sigmoid(logits: Tensor) -> Tensor:
    """1 / (1 + exp(-x_i))."""
    return 1 / (1 + torch.exp(-logits))


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x_i))), for logits of ordinary size."""
    return torch.log(1 + torch.exp(logits)).sqrt()


AFFINITIES = {"sigmoid": sigmoid, "softmax": softmax, "sqrt_softplus": sqrt_softplus}


def best(values: Sequence[float], count: int) -> list[int]:
    """The places of the highest values, falling; the lower place first where they tie."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def ceiling(factor: float, count: int, parts: int) -> int:
    """ceil(factor * count / parts) for the factor as it is written in decimals."""
    return math.ceil(Fraction(str(factor)) * count / parts)


def groups_of(valid: list[list[bool]], over: str, chunk: int | None = None) -> list[list[int]]:
    """The numbers of the valid tokens of every sequence, of every chunk of one, or of the whole micro-batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, flags in enumerate(valid):
        for place, counts in enumerate(flags):
            key = (0, 0) if over == "batch" else (row, 0 if chunk is None else place // chunk)
            if counts:
                groups.setdefault(key, []).append(row * len(flags) + place)
    return list(groups.values())


# ---- routers


def within_groups(
    biased: list[float], top_k: int, groups: int, group_limit: int, group_score: int
) -> list[int]:
    """The best experts of the strongest groups; a group is as strong as its best `group_score` experts together."""
    size = len(biased) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    strength = [
        sum(sorted((biased[e] for e in group), reverse=True)[:group_score]) for group in members
    ]
    allowed = sorted(e for g in best(strength, group_limit) for e in members[g])
    return [allowed[i] for i in best([biased[e] for e in allowed], top_k)]


def deepseek_v3(
    logits: Rows,
    bias: list[float],
    *,
    top_k: int,
    groups: int = 1,
    group_limit: int | None = None,
    group_score: int | None = None,
    scale: float = 1.0,
    affinity: str = "sigmoid",
    normalise: bool = True,
) -> list[Assigned]:
    """Report, eq. 12-16 and section 2.1.2: biased for the choice, unbiased in the gates."""
    limit = groups if group_limit is None else group_limit
    strength = max(1, top_k // limit) if group_score is None else group_score
    result = []
    for token, row in enumerate(logits):
        scores = AFFINITIES[affinity](row)
        biased = [s + b for s, b in zip(scores.tolist(), bias, strict=True)]
        chosen = within_groups(biased, top_k, groups, limit, strength)
        total = torch.stack([scores[e] for e in chosen]).sum() if normalise else 1.0
        result += [Assigned(token, e, scores[e] / total * scale) for e in chosen]
    return result


def hash_gated(
    logits: Rows,
    table: Sequence[Sequence[int]],
    ids: Sequence[int],
    *,
    scale: float = 1.0,
    affinity: str = "sqrt_softplus",
    normalise: bool = True,
) -> list[Assigned]:
    """DeepSeek-V4 (2606.19348, section 2.1): the table chooses by the token's id, the affinities are the gates."""
    result = []
    for token, (row, token_id) in enumerate(zip(logits, ids, strict=True)):
        scores = AFFINITIES[affinity](row)
        chosen = table[token_id]
        total = torch.stack([scores[e] for e in chosen]).sum() if normalise else 1.0
        result += [Assigned(token, e, scores[e] / total * scale) for e in chosen]
    return result


def deepseek_v2(
    logits: Rows, *, top_k: int, groups: int = 1, group_limit: int | None = None, scale: float = 1.0
) -> list[Assigned]:
    """DeepSeek-V2, eq. 20-22 and section 2.2.2: softmax, groups by their maximum, gates not normalised."""
    result = []
    for token, row in enumerate(logits):
        scores = softmax(row)
        chosen = within_groups(
            scores.tolist(), top_k, groups, groups if group_limit is None else group_limit, 1
        )
        result += [Assigned(token, e, scores[e] * scale) for e in chosen]
    return result


def gshard(
    logits: Rows,
    groups: list[list[int]],
    *,
    capacity_factor: float = 1.0,
    chance: Sequence[float] | None = None,
) -> list[Assigned]:
    """GShard, algorithm 1, for each local group; `chance` is one number for each token, None: second: always."""
    first: dict[int, Assigned] = {}
    second: dict[int, Assigned] = {}
    for group in groups:
        experts = len(logits[group[0]])
        capacity, counter = ceiling(capacity_factor, 2 * len(group), experts), [0] * experts
        for s in group:
            g = softmax(logits[s])
            e1, e2 = best(g.tolist(), 2)
            first[s] = Assigned(s, e1, g[e1] / (g[e1] + g[e2]), counter[e1] < capacity)
            second[s] = Assigned(s, e2, g[e2] / (g[e1] + g[e2]))
            counter[e1] += 1
        for s in group:
            e2 = second[s].expert
            lucky = chance is None or 2 * second[s].gate.item() > chance[s]
            second[s] = replace(second[s], kept=counter[e2] < capacity and lucky)
            counter[e2] += 1
    return [choice[s] for s in sorted(first) for choice in (first, second)]


def gshard_dropless(logits: Rows, *, top_k: int = 2, normalise: bool = False) -> list[Assigned]:
    """DeepSeekMoE, eq. 3-5: softmax and top-K, nothing dropped."""
    result = []
    for token, row in enumerate(logits):
        scores = softmax(row)
        chosen = best(scores.tolist(), top_k)
        total = torch.stack([scores[e] for e in chosen]).sum() if normalise else 1.0
        result += [Assigned(token, e, scores[e] / total) for e in chosen]
    return result


def switch(
    logits: Rows, groups: list[list[int]], *, capacity_factor: float = 1.25
) -> list[Assigned]:
    """Switch, section 2.2: the best expert with its probability as gate, first come first served."""
    result = []
    for group in groups:
        experts = len(logits[group[0]])
        capacity, counter = ceiling(capacity_factor, len(group), experts), [0] * experts
        for token in group:
            scores = softmax(logits[token])
            e = best(scores.tolist(), 1)[0]
            result.append(Assigned(token, e, scores[e], counter[e] < capacity))
            counter[e] += 1
    return result


def expert_choice(logits: Rows, groups: list[list[int]], *, top_k: int) -> list[Assigned]:
    """Expert Choice, section 3.2: every expert takes its best k = n c / e tokens of a group of n."""
    result = []
    for group in groups:
        scores = [softmax(logits[token]) for token in group]
        experts = len(scores[0])
        for e in range(experts):
            taken = best([s[e].item() for s in scores], ceiling(top_k, len(group), experts))
            result += [Assigned(group[i], e, scores[i][e]) for i in taken]
    return result


def balanced_table(counts: list[int], experts: int, top_k: int = 1) -> list[list[int]]:
    """Hash Layers' balanced map: frequent tokens first, each to the experts with the least count so far."""
    table: list[list[int]] = [[] for _ in counts]
    count, ids = [0] * experts, [0] * experts
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        table[token] = sorted(range(experts), key=lambda e: (count[e], ids[e], e))[:top_k]
        for e in table[token]:
            count[e], ids[e] = count[e] + counts[token], ids[e] + 1
    return table


def forced_balance(
    logits: Rows, numbers: list[int], *, top_k: int, scale: float = 1.0
) -> list[Assigned]:
    """Token number n takes the next K experts in turn; gates are normalised sigmoid affinities."""
    result = []
    for token, (row, n) in enumerate(zip(logits, numbers, strict=True)):
        scores = sigmoid(row)
        chosen = [(n * top_k + k) % len(row) for k in range(top_k)]
        total = torch.stack([scores[e] for e in chosen]).sum()
        result += [Assigned(token, e, scores[e] / total * scale) for e in chosen]
    return result


def dropped_over_budget(
    assigned: list[tuple[int, int]],
    scores: Rows,
    valid: list[bool],
    protected: list[bool],
    *,
    devices: int,
    capacity_factor: float = 1.0,
) -> list[bool]:
    """DeepSeek-V2, section 2.2.4: which (token, expert) pairs are kept; `valid` and `protected` are given for tokens.

    Each device keeps its budget: protected ones first, all of them, then those of highest affinity, earlier first.
    """
    counted = [a for a, (token, _) in enumerate(assigned) if valid[token]]
    budget = ceiling(capacity_factor, len(counted), devices)
    kept = [False] * len(assigned)
    for device in range(devices):
        here = [a for a in counted if assigned[a][1] // (len(scores[0]) // devices) == device]
        safe = [a for a in here if protected[assigned[a][0]]]
        rest = [a for a in here if not protected[assigned[a][0]]]
        rest.sort(key=lambda a: -scores[assigned[a][0]][assigned[a][1]].item())
        for a in safe + rest[: max(0, budget - len(safe))]:
            kept[a] = True
    return kept


# ---- losses of one piece (a sequence, a micro-batch or a batch), before their coefficient


def shares(scores: Rows) -> list[Tensor]:
    """P: every token's scores over their sum, averaged over the tokens."""
    mean = torch.stack([s / s.sum() for s in scores]).sum(dim=0) / len(scores)
    return list(mean)


def counted(chosen: list[list[int]], experts: int) -> list[int]:
    """How many tokens chose each expert."""
    return [sum(e in row for row in chosen) for e in range(experts)]


def _product(f: list[float], p: list[Tensor]) -> Tensor:
    return torch.stack([a * b for a, b in zip(f, p, strict=True)]).sum()


def expert_loss(scores: Rows, chosen: list[list[int]], top_k: int) -> Tensor:
    """DeepSeek-V2, eq. 23-25: f_i = E / (K T) times the tokens that chose expert i."""
    experts, tokens = len(scores[0]), len(scores)
    return _product(
        [experts / (top_k * tokens) * c for c in counted(chosen, experts)], shares(scores)
    )


def share_loss(scores: Rows, top_k: int) -> Tensor:
    """Report, eq. 17-20: the same with the unbiased, ungrouped top-K of the scores."""
    return expert_loss(scores, [best(s.tolist(), top_k) for s in scores], top_k)


def device_loss(scores: Rows, chosen: list[list[int]], top_k: int, devices: int) -> Tensor:
    """DeepSeek-V2, eq. 26-28: the mean f and the summed P of each device's experts."""
    experts, tokens = len(scores[0]), len(scores)
    size, p = experts // devices, shares(scores)
    f = [experts / (top_k * tokens) * c for c in counted(chosen, experts)]
    members = [range(d * size, (d + 1) * size) for d in range(devices)]
    return _product(
        [sum(f[e] for e in m) / size for m in members], [sum(p[e] for e in m) for m in members]
    )


def communication_loss(
    scores: Rows, chosen: list[list[int]], devices: int, device_limit: int
) -> Tensor:
    """DeepSeek-V2, eq. 29-31: f_i = D / (M T) times the tokens sent to device i, each of them once."""
    tokens, size, p = len(scores), len(scores[0]) // devices, shares(scores)
    sent = counted([list({e // size for e in row}) for row in chosen], devices)
    together = [sum(p[e] for e in range(d * size, (d + 1) * size)) for d in range(devices)]
    return _product([devices / (device_limit * tokens) * c for c in sent], together)


def switch_loss(scores: Rows) -> Tensor:
    """Switch, eq. 4-6: E times the sum over experts of the fraction of first choices times P."""
    experts, tokens = len(scores[0]), len(scores)
    first = counted([best(s.tolist(), 1) for s in scores], experts)
    return experts * _product([c / tokens for c in first], shares(scores))


def gshard_loss(scores: Rows) -> Tensor:
    """GShard, algorithm 1, line 13: the mean over experts of c_e / S times m_e, c_e of first choices."""
    return switch_loss(scores) / len(scores[0]) ** 2


def z_loss(logits: Rows) -> Tensor:
    """ST-MoE, eq. 5, summed over the tokens: the square of the logarithm of the sum of exponentials."""
    high = [row.detach().max() for row in logits]
    logs = [
        torch.log(torch.exp(row - top).sum()) + top for row, top in zip(logits, high, strict=True)
    ]
    return torch.stack([log * log for log in logs]).sum()


# ---- the selection bias


def bias_step(
    bias: list[float],
    load: list[int],
    rate: float,
    *,
    update: str = "sign",
    unit: str = "relative",
    centre: bool,
) -> list[float]:
    """Algorithm 1 of 2408.15664 and its variants (tables 3 and 4), in exact numbers up to the end."""
    total = sum(load)
    mean = Fraction(total, len(load))
    if update == "sign":
        moves = [Fraction((mean > c) - (mean < c)) for c in load]
    else:
        divisor = mean if unit == "relative" else Fraction(total)
        moves = [(mean - c) / divisor if total else Fraction(0) for c in load]
    shift = sum(moves) / len(moves) if centre else Fraction(0)
    return [b + rate * float(move - shift) for b, move in zip(bias, moves, strict=True)]


# ---- Quantile Balancing (Kimi K3 report, section 2.3.3 and appendix D; within groups as our plugin's README says)


def needed_biases(
    scores: Sequence[Sequence[float]],
    bias: Sequence[float],
    top_k: int,
    *,
    groups: int = 1,
    group_limit: int = 1,
    experts_per_group_score: int = 1,
) -> list[list[float]]:
    """The bias that each expert needs for each token to select it.

    Its own bias plus what its score s + b is short of the (k+1)-th best one in the token's groups. If a token reaches
    only some groups, at least its own bias plus what the score of its group is short of that of the worst reached one
    (of the best one not reached, if it is reached), for each of the experts that the group's score adds up.
    """
    size = len(bias) // groups
    needed = []
    for plain in scores:
        biased = [s + b for s, b in zip(plain, bias, strict=True)]
        strength = []
        for group in range(groups):
            own = sorted(biased[group * size : (group + 1) * size], reverse=True)
            strength.append(sum(own[:experts_per_group_score]))
        order = best(strength, groups)
        reached = order[:group_limit]
        in_reach = [biased[e] for e in range(len(bias)) if e // size in reached]
        cutoff = sorted(in_reach, reverse=True)[top_k] if top_k < len(in_reach) else -math.inf
        row = []
        for expert, score in enumerate(biased):
            short = cutoff - score
            if group_limit < groups:
                group = expert // size
                rival = order[group_limit] if group in reached else order[group_limit - 1]
                gap = (strength[rival] - strength[group]) / experts_per_group_score
                short = max(short, gap)
            row.append(bias[expert] + short)
        needed.append(row)
    return needed


def quantile_histogram(
    needed: Sequence[Sequence[float]], bias: Sequence[float], bins: int, span: float = 1.0
) -> list[list[int]]:
    """How many tokens need a bias in each bin, for each expert; the bins go from min(b) - span to max(b) + span."""
    low = min(bias) - span
    width = (max(bias) + span - low) / bins
    histogram = [[0] * bins for _ in bias]
    for token in needed:
        for expert, value in enumerate(token):
            place = math.floor((value - low) / width)
            histogram[expert][min(max(place, 0), bins - 1)] += 1
    return histogram


def quantile_step(
    histogram: Sequence[Sequence[int]],
    bias: Sequence[float],
    top_k: int,
    *,
    span: float = 1.0,
    ema: float = 0.0,
) -> list[float]:
    """The next biases: k/E quantiles, interpolated inside a bin, centred; the old ones where nothing was counted."""
    low = min(bias) - span
    width = (max(bias) + span - low) / len(histogram[0])
    solved = []
    for counts in histogram:
        if not sum(counts):
            return list(bias)
        target = Fraction(sum(counts) * top_k, len(histogram))
        below = 0
        for place, inside in enumerate(counts):
            if below + inside >= target:
                solved.append(low + width * (place + float((target - below) / inside)))
                break
            below += inside
    mean = sum(solved) / len(solved)
    return [ema * old + (1 - ema) * (new - mean) for old, new in zip(bias, solved, strict=True)]
