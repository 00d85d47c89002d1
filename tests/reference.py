"""The specification as slow and simple code: one token, one head and one expert at a time, in fp64.

Written from the papers' equations, independently of the model: DeepSeek-V3's report (arXiv 2412.19437), eq. 1-11
(attention), 12-16 (experts), 17-20 (sequence-wise loss), 21-25 (multi-token prediction); arXiv 2408.15664, algorithm
1 (bias). It knows the model's weights by name only, so gradients through it are gradients of the same parameters.
"""

import cmath
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """Settings of YaRN (arXiv 2309.00071; report, section 4.3)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Settings:
    """The numbers that cannot be read off the weights' shapes."""

    heads: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    top_k: int
    groups: int = 1
    group_limit: int = 1
    scale: float = 1.0
    theta: float = 10000.0
    yarn: Yarn | None = None
    eps: float = 1e-6


@dataclass(frozen=True)
class Line:
    """One sequence: L tokens with their targets; `documents` has L + 1 entries, the last for the last target."""

    tokens: list[int]
    targets: list[int]
    valid: list[bool]
    documents: list[int]


@dataclass(frozen=True)
class Choice:
    """One token's routing: the chosen experts, their gates, and every expert's affinity."""

    experts: list[int]
    gates: list[Tensor]
    scores: Tensor


@dataclass
class Outcome:
    """The result of a batch of lines: sums and counts of every loss, and every layer's load."""

    logits: list[list[Tensor]] = field(default_factory=list)
    terms: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    balance: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    loads: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, name: str, value: Tensor, count: int) -> None:
        """Adds to a loss's sum and count; `kind` is terms or balance."""
        table = getattr(self, kind)
        total, counted = table.get(name, (torch.zeros((), dtype=torch.float64), 0))
        table[name] = (total + value, counted + count)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x); the first half of the rows of `gate_up` is the gate."""
    width = gate_up.shape[0] // 2
    gate, up = gate_up[:width] @ x, gate_up[width:] @ x
    return down @ (gate / (1 + torch.exp(-gate)) * up)


def rotations(pair: int, dim: int, theta: float, length: int) -> float:
    """How many full turns a pair of a vector of width `dim` makes over `length` positions."""
    return length * theta ** (-2 * pair / dim) / (2 * math.pi)


def yarn_range(dim: int, theta: float, yarn: Yarn) -> tuple[int, int]:
    """The last pair that turns at least beta_fast times, and the first that turns at most beta_slow times."""
    turns = [rotations(j, dim, theta, yarn.original_length) for j in range(dim)]
    low = max([j for j in range(dim) if turns[j] >= yarn.beta_fast], default=0)
    high = min([j for j in range(dim) if turns[j] <= yarn.beta_slow], default=dim - 1)
    return low, high


def frequencies(dim: int, theta: float, yarn: Yarn | None) -> list[float]:
    """Angle per position of each pair; with YaRN slow pairs turn `factor` times slower."""
    plain = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if yarn is None:
        return plain
    low, high = yarn_range(dim, theta, yarn)
    result = []
    for j, frequency in enumerate(plain):
        ramp = 0.0 if j <= low else 1.0 if j >= high else (j - low) / (high - low)
        result.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return result


def mscale(factor: float, coefficient: float) -> float:
    """0.1 m ln(s) + 1."""
    return 0.1 * coefficient * math.log(factor) + 1


def softmax_scale(head_dim: int, yarn: Yarn | None) -> float:
    """1/sqrt(head width), times YaRN's temperature squared."""
    return head_dim**-0.5 * (1.0 if yarn is None else mscale(yarn.factor, yarn.mscale_all_dim) ** 2)


def rotate(x: Tensor, position: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Pairs (x0, x1), (x2, x3), ... as complex numbers times exp(i position frequency)."""
    ratio = (
        1.0
        if yarn is None
        else mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    )
    turns = [
        ratio * cmath.exp(1j * position * frequency)
        for frequency in frequencies(len(x), theta, yarn)
    ]
    turned = torch.complex(x[0::2], x[1::2]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.stack([turned.real, turned.imag], dim=1).flatten()


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """sum_j softmax_j(q k_j scale) v_j."""
    scores = torch.stack(keys) @ query * scale
    weights = torch.exp(scores - scores.detach().max())
    return weights @ torch.stack(values) / weights.sum()


def causal(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], scale: float, docs: list[int]
) -> list[Tensor]:
    """One head: token t attends to the tokens up to t of its own document."""
    outputs = []
    for t, query in enumerate(queries):
        seen = [j for j in range(t + 1) if docs[j] == docs[t]]
        outputs.append(attend(query, [keys[j] for j in seen], [values[j] for j in seen], scale))
    return outputs


def choose(scores: list[float], bias: list[float], settings: Settings) -> list[int]:
    """The experts of one token: best groups by the sum of their best K/M biased affinities, then the best K in them."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // settings.groups
    groups = [range(g * size, (g + 1) * size) for g in range(settings.groups)]
    best = max(1, settings.top_k // settings.group_limit)
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:best]) for group in groups]
    near = sorted(range(settings.groups), key=lambda g: -strength[g])[: settings.group_limit]
    allowed = [e for g in near for e in groups[g]]
    return sorted(allowed, key=lambda e: -biased[e])[: settings.top_k]


def route(x: Tensor, centroids: Tensor, bias: list[float], settings: Settings) -> Choice:
    """Eq. 13-16: sigmoid affinities; biased for the choice, unbiased and normalised in the gates."""
    scores = 1 / (1 + torch.exp(-(centroids @ x)))
    chosen = choose(scores.tolist(), bias, settings)
    total = torch.stack([scores[e] for e in chosen]).sum()
    return Choice(chosen, [scores[e] / total * settings.scale for e in chosen], scores)


def sequence_loss(scores: list[Tensor], top_k: int) -> Tensor:
    """Eq. 17-20 without alpha, for the tokens of one sequence: ungrouped and unbiased top-K; f is a constant."""
    tokens, experts = len(scores), len(scores[0])
    counts = [0] * experts
    for s in map(torch.Tensor.tolist, scores):
        for e in sorted(range(experts), key=lambda e, s=s: -s[e])[:top_k]:
            counts[e] += 1
    f = [experts / (top_k * tokens) * count for count in counts]
    p = torch.stack([s / s.sum() for s in scores]).sum(dim=0) / tokens
    return torch.stack([f[e] * p[e] for e in range(experts)]).sum()


def bias_update(bias: list[float], load: list[int], rate: float) -> list[float]:
    """Algorithm 1: b_i += u sign(mean load - load_i), the comparison in exact numbers."""
    mean = Fraction(sum(load), len(load))
    return [b + rate * ((mean > c) - (mean < c)) for b, c in zip(bias, load, strict=True)]


def pieces(documents: list[int]) -> list[list[int]]:
    """The positions of each run of equal document numbers."""
    runs: list[list[int]] = []
    for t, document in enumerate(documents):
        if t == 0 or document != documents[t - 1]:
            runs.append([])
        runs[-1].append(t)
    return runs


class Reference:
    """The whole model over a state dict; every floating weight becomes an fp64 leaf that takes a gradient."""

    def __init__(self, state: Mapping[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        self.weights = {
            name: value.detach().to(torch.float64).clone() for name, value in state.items()
        }
        for name, value in self.weights.items():
            value.requires_grad_(not name.endswith(".bias"))

    def run(self, lines: list[Line]) -> Outcome:
        """Logits, losses and loads of a batch."""
        outcome = Outcome()
        for line in lines:
            self._line(line, outcome)
        return outcome

    def _line(self, line: Line, outcome: Outcome) -> None:
        length = len(line.tokens)
        documents = line.documents[:length]
        xs, seen = self._hidden(line.tokens, documents)
        outcome.logits.append([self.weights["output.weight"] @ x for x in xs])
        counted = [
            line.valid[i] and line.documents[i] == line.documents[i + 1] for i in range(length)
        ]
        self._predict("next_token", xs, line.targets, counted, sum(counted), outcome)
        for path, choices in seen.items():
            self._balance(path, choices, line.valid, documents, outcome)
        for k in range(1, self._depths() + 1):
            xs = self._depth(k, xs, line, sum(counted), outcome)

    def _hidden(
        self, tokens: list[int], documents: list[int]
    ) -> tuple[list[Tensor], dict[str, list[Choice]]]:
        xs = [self.weights["embedding.weight"][token] for token in tokens]
        seen = {}
        for layer in range(self._count("blocks.{}.ffn_norm.weight")):
            path = f"blocks.{layer}"
            xs, choices = self._block(path, xs, list(range(len(xs))), documents)
            if choices:
                seen[path] = choices
        return [self._norm("norm", x) for x in xs], seen

    def _depth(
        self, k: int, states: list[Tensor], line: Line, divisor: int, outcome: Outcome
    ) -> list[Tensor]:
        """Eq. 21-24: position i joins its state with the embedding of token i + k and predicts token i + k + 1."""
        path, rows = f"heads.mtp.depths.{k - 1}", range(len(line.tokens) - k)
        joined = []
        for i in rows:
            embedded = self._norm(
                f"{path}.embedding_norm", self.weights["embedding.weight"][line.tokens[i + k]]
            )
            joined.append(torch.cat([embedded, self._norm(f"{path}.hidden_norm", states[i])]))
        xs = [self._weight(f"{path}.projection") @ x for x in joined]
        documents = [line.documents[i] for i in rows]
        xs, choices = self._block(f"{path}.block", xs, [i + k for i in rows], documents)
        xs = [self._norm(f"{path}.norm", x) for x in xs]
        counted = [
            line.valid[i] and line.valid[i + k] and line.documents[i] == line.documents[i + k + 1]
            for i in rows
        ]
        self._predict(f"mtp/depth_{k}", xs, line.targets[k:], counted, divisor, outcome)
        if choices:
            self._balance(f"{path}.block", choices, counted, documents, outcome)
        return xs

    def _predict(
        self,
        term: str,
        xs: list[Tensor],
        targets: list[int],
        counted: list[bool],
        divisor: int,
        outcome: Outcome,
    ) -> None:
        total = torch.zeros((), dtype=torch.float64)
        for x, target, counts in zip(xs, targets, counted, strict=True):
            if counts:
                logits = self.weights["output.weight"] @ x
                highest = logits.detach().max()
                total = (
                    total + torch.log(torch.exp(logits - highest).sum()) + highest - logits[target]
                )
        outcome.add("terms", term, total, divisor)

    def _balance(
        self,
        path: str,
        choices: list[Choice],
        valid: list[bool],
        documents: list[int],
        outcome: Outcome,
    ) -> None:
        load = outcome.loads.setdefault(path, [0] * len(choices[0].scores))
        for choice, counts in zip(choices, valid, strict=True):
            for expert in choice.experts if counts else ():
                load[expert] += 1
        outcome.add("balance", path, torch.zeros((), dtype=torch.float64), 0)
        for piece in pieces(documents):
            scores = [choices[t].scores for t in piece if valid[t]]
            if scores:
                outcome.add("balance", path, sequence_loss(scores, self.settings.top_k), 1)

    def _block(
        self, path: str, xs: list[Tensor], positions: list[int], documents: list[int]
    ) -> tuple[list[Tensor], list[Choice]]:
        normed = [self._norm(f"{path}.attention_norm", x) for x in xs]
        mixed = self.attention(f"{path}.attention", normed, positions, documents)
        xs = [x + u for x, u in zip(xs, mixed, strict=True)]
        normed = [self._norm(f"{path}.ffn_norm", x) for x in xs]
        if f"{path}.ffn.router.centroids.weight" not in self.weights:
            outputs = [self._swiglu(f"{path}.ffn", x) for x in normed]
            return [x + y for x, y in zip(xs, outputs, strict=True)], []
        routed = [self.experts(f"{path}.ffn", x) for x in normed]
        return [x + y for x, (y, _) in zip(xs, routed, strict=True)], [
            choice for _, choice in routed
        ]

    def attention(
        self, path: str, xs: list[Tensor], positions: list[int], documents: list[int]
    ) -> list[Tensor]:
        """Eq. 1-11: multi-head latent attention over the tokens of one line."""
        s = self.settings
        per_token = [
            self._heads_of(path, x, position) for x, position in zip(xs, positions, strict=True)
        ]
        scale = softmax_scale(s.nope + s.rope, s.yarn)
        heads = []
        for i in range(s.heads):
            queries, keys, values = ([parts[kind][i] for parts in per_token] for kind in range(3))
            heads.append(causal(queries, keys, values, scale, documents))
        return [
            self._weight(f"{path}.output") @ torch.cat([head[t] for head in heads])
            for t in range(len(xs))
        ]

    def _heads_of(
        self, path: str, x: Tensor, position: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The queries, keys and values of every head for one token."""
        s = self.settings
        turn: Callable[[Tensor], Tensor] = lambda y: rotate(y, position, s.theta, s.yarn)  # noqa: E731
        if f"{path}.q.weight" in self.weights:
            q = self._weight(f"{path}.q") @ x
        else:
            q = self._weight(f"{path}.q_up") @ self._norm(
                f"{path}.q_norm", self._weight(f"{path}.q_down") @ x
            )
        down = self._weight(f"{path}.kv_down") @ x
        latent, shared_key = (
            self._norm(f"{path}.kv_norm", down[: s.kv_rank]),
            turn(down[s.kv_rank :]),
        )
        kv = self._weight(f"{path}.kv_up") @ latent
        queries, keys, values = [], [], []
        for i in range(s.heads):
            query = q[i * (s.nope + s.rope) : (i + 1) * (s.nope + s.rope)]
            key_value = kv[i * (s.nope + s.value) : (i + 1) * (s.nope + s.value)]
            queries.append(torch.cat([query[: s.nope], turn(query[s.nope :])]))
            keys.append(torch.cat([key_value[: s.nope], shared_key]))
            values.append(key_value[s.nope :])
        return queries, keys, values

    def experts(self, path: str, x: Tensor) -> tuple[Tensor, Choice]:
        """Eq. 12: shared experts, and the gated outputs of the chosen ones."""
        centroids = self._weight(f"{path}.router.centroids")
        bias = self.weights.get(f"{path}.balance.0.bias", torch.zeros(len(centroids))).tolist()
        choice = route(x, centroids, bias, self.settings)
        y = torch.zeros_like(x)
        if f"{path}.shared.down.weight" in self.weights:
            y = y + self._swiglu(f"{path}.shared", x)
        for expert, gate in zip(choice.experts, choice.gates, strict=True):
            gate_up, down = (
                self._weight(f"{path}.routed.gate_up")[expert],
                self._weight(f"{path}.routed.down")[expert],
            )
            y = y + gate * swiglu(x, gate_up, down)
        return y, choice

    def head_attention(
        self, path: str, xs: list[Tensor], documents: list[int], kv_heads: int
    ) -> list[Tensor]:
        """Multi-head (kv_heads = heads), grouped-query or multi-query attention with rotated queries and keys."""
        heads = self.settings.heads
        width = self._weight(f"{path}.q").shape[0] // heads
        turn: Callable[[Tensor, int], Tensor] = lambda y, t: rotate(y, t, self.settings.theta)  # noqa: E731
        outputs = []
        for i in range(heads):
            j = i * kv_heads // heads
            rows, kv_rows = slice(i * width, (i + 1) * width), slice(j * width, (j + 1) * width)
            queries = [turn(self._weight(f"{path}.q")[rows] @ x, t) for t, x in enumerate(xs)]
            keys = [turn(self._weight(f"{path}.k")[kv_rows] @ x, t) for t, x in enumerate(xs)]
            values = [self._weight(f"{path}.v")[kv_rows] @ x for x in xs]
            outputs.append(causal(queries, keys, values, width**-0.5, documents))
        return [
            self._weight(f"{path}.output") @ torch.cat([head[t] for head in outputs])
            for t in range(len(xs))
        ]

    def _swiglu(self, path: str, x: Tensor) -> Tensor:
        return swiglu(x, self._weight(f"{path}.gate_up"), self._weight(f"{path}.down"))

    def _norm(self, path: str, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight(path), self.settings.eps)

    def _weight(self, path: str) -> Tensor:
        return self.weights[f"{path}.weight"]

    def _depths(self) -> int:
        return self._count("heads.mtp.depths.{}.projection.weight")

    def _count(self, pattern: str) -> int:
        count = 0
        while pattern.format(count) in self.weights:
            count += 1
        return count
