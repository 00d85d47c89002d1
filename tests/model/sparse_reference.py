"""Sparse attention once more, as loops over queries, heads and positions, from arXiv 2512.02556 (eq. 1 to 4)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from reference import rotate
from torch import Tensor


@dataclass(frozen=True)
class Widths:
    """The settings of a layer."""

    heads: int
    nope: int
    rope: int
    value: int
    index_heads: int
    top_k: int
    theta: float
    eps: float


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one vector."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of one vector with epsilon 1e-6."""
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-6) * weight + bias


def rotate_halves(x: Tensor, position: int, width: int, theta: float) -> Tensor:
    """Pairs element j of the first `width` with element j + width / 2; the rest stays."""
    half = width // 2
    turned = x.clone()
    for j in range(half):
        angle = position * theta ** (-2 * j / width)
        turned[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        turned[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return turned


def best(scores: Sequence[float], visible: Sequence[int], k: int) -> list[int]:
    """The k visible positions with the highest scores, of equal ones the lower, in ascending order."""
    ranked = sorted(visible, key=lambda s: (-scores[s], s))
    return sorted(ranked[:k])


def sparse_attention(
    x_LD: Tensor,
    weights: Mapping[str, Tensor],
    widths: Widths,
    documents: Sequence[int],
    *,
    dense: bool = False,
) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """The outputs of one sequence, the divergence at each query, and the positions that it attends to."""
    w = weights
    length, heads, nope = len(x_LD), widths.heads, widths.nope
    key_dim = nope + widths.rope
    queries, keys, values, index_queries, index_keys, index_weights = [], [], [], [], [], []
    for t in range(length):
        latent = rms(w["q_down.weight"] @ x_LD[t], w["q_norm.weight"], widths.eps)
        q_HX = (w["q_up.weight"] @ latent).view(heads, key_dim)
        down = w["kv_down.weight"] @ x_LD[t]
        rank = len(down) - widths.rope
        kv_HX = (w["kv_up.weight"] @ rms(down[:rank], w["kv_norm.weight"], widths.eps)).view(
            heads, -1
        )
        k_R = rotate(down[rank:], t, widths.theta)
        queries.append(
            [torch.cat([q[:nope], rotate(q[nope:], t, widths.theta)]) for q in q_HX.unbind()]
        )
        keys.append([torch.cat([kv[:nope], k_R]) for kv in kv_HX.unbind()])
        values.append([kv[nope:] for kv in kv_HX.unbind()])
        x_D = x_LD[t].detach()
        iq_HX = (w["indexer.q.weight"] @ latent.detach()).view(widths.index_heads, -1)
        index_queries.append(
            [rotate_halves(q, t, widths.rope, widths.theta) for q in iq_HX.unbind()]
        )
        key = layer_norm(
            w["indexer.k.weight"] @ x_D, w["indexer.k_norm.weight"], w["indexer.k_norm.bias"]
        )
        index_keys.append(rotate_halves(key, t, widths.rope, widths.theta))
        index_weights.append(w["indexer.weights.weight"] @ x_D)
    outputs, divergences, chosen = [], [], []
    for t in range(length):
        visible = [s for s in range(t + 1) if documents[s] == documents[t]]
        scores = {}
        for s in visible:
            total = torch.zeros((), dtype=x_LD.dtype)
            for h in range(widths.index_heads):
                product = index_queries[t][h] @ index_keys[s] / math.sqrt(len(index_keys[s]))
                weight = index_weights[t][h] / math.sqrt(widths.index_heads)
                total = total + weight * torch.relu(product)
            scores[s] = total
        numbers = [float(scores[s].detach()) if s in scores else -math.inf for s in range(length)]
        attended = visible if dense else best(numbers, visible, widths.top_k)
        found = []
        p = torch.zeros(len(attended), dtype=x_LD.dtype)
        for h in range(heads):
            logits = [queries[t][h] @ keys[s][h] / math.sqrt(key_dim) for s in attended]
            shares = torch.stack(logits).softmax(dim=0)
            p = p + shares.detach()
            found.append(
                sum(share * values[s][h] for share, s in zip(shares, attended, strict=True))
            )
        outputs.append(w["output.weight"] @ torch.cat(found))
        p = p / p.sum()
        log_q = torch.stack([scores[s] for s in attended]).log_softmax(dim=0)
        divergences.append(sum(p[i] * (p[i].log() - log_q[i]) for i in range(len(attended))))
        chosen.append(attended)
    return torch.stack(outputs), divergences, chosen
