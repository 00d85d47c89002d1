"""A checkpoint's model as loops over tokens, heads and experts in fp64, from its config.json and its tensors alone.

It follows the papers (see `tests/reference.py`, whose small pieces it uses) and, where a checkpoint's meaning is set by
transformers and vLLM alone, what those do: which norms have which epsilon, how many affinities speak for a group,
what YaRN does when a coefficient is missing, and where the multi-token layers lie. It knows neither `core` nor
`plugins` nor transformers.
"""

import cmath
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from reference import Yarn, causal, frequencies, mscale, rms_norm, swiglu
from torch import Tensor

LATENT_EPS = 1e-6
"""Epsilon of the norms on the two latents, whatever `rms_norm_eps` is."""


@dataclass(frozen=True)
class Choice:
    """One token's routing; `margin` is how much an affinity would have to move for another choice."""

    experts: list[int]
    gates: list[Tensor]
    margin: float


@dataclass(frozen=True)
class Rope:
    """How vectors are turned: frequencies, a factor on cosine and sine, the layout, and the softmax scale's factor."""

    frequencies: list[float]
    factor: float
    interleaved: bool
    temperature: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Rope":
        """Reads a configuration with `rope_scaling` or with `rope_parameters`."""
        settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = settings.get("rope_type", settings.get("type", "default"))
        theta, dim = (
            settings.get("rope_theta", config.get("rope_theta")),
            config["qk_rope_head_dim"],
        )
        interleaved = config["model_type"] == "deepseek_v2" or config.get("rope_interleave", True)
        if kind == "default":
            return cls(frequencies(dim, theta, None), 1.0, interleaved, 1.0)
        assert kind == "yarn", kind
        factor, one, all_dim = (
            settings["factor"],
            settings.get("mscale"),
            settings.get("mscale_all_dim"),
        )
        yarn = Yarn(
            factor,
            settings["original_max_position_embeddings"],
            settings["beta_fast"],
            settings["beta_slow"],
        )
        both = (
            mscale(factor, one) / mscale(factor, all_dim)
            if one and all_dim
            else mscale(factor, 1.0)
        )
        given_factor = settings.get("attention_factor")
        temperature = mscale(factor, all_dim) ** 2 if all_dim else 1.0
        on_rotated = both if given_factor is None else given_factor
        return cls(frequencies(dim, theta, yarn), on_rotated, interleaved, temperature)

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Neighbours are pairs, or the two halves are each other's partners."""
        half = len(x) // 2
        real, imaginary = (x[0::2], x[1::2]) if self.interleaved else (x[:half], x[half:])
        turns = [self.factor * cmath.exp(1j * position * f) for f in self.frequencies]
        turned = torch.complex(real, imaginary) * torch.tensor(turns, dtype=torch.complex128)
        if self.interleaved:
            return torch.stack([turned.real, turned.imag], dim=1).flatten()
        return torch.cat([turned.real, turned.imag])


def strength(affinities: list[float], config: Mapping[str, Any]) -> float:
    """What speaks for a group: its best affinity in V2, its best two together in V3."""
    best = sorted(affinities, reverse=True)
    return best[0] if config["model_type"] == "deepseek_v2" else best[0] + best[1]


def best(values: Mapping[int, float], count: int) -> tuple[list[int], float]:
    """The keys of the highest values, and how far the last of them lies above the first that is left out."""
    order = sorted(values, key=lambda key: -values[key])
    gap = values[order[count - 1]] - values[order[count]] if count < len(order) else math.inf
    return order[:count], gap


def choose(selection: list[float], config: Mapping[str, Any]) -> tuple[list[int], float]:
    """The experts of one token, from what they are chosen by, and the margin of that choice."""
    allowed, gap = dict(enumerate(selection)), math.inf
    limited = (
        config["model_type"] == "deepseek_v3" or config.get("topk_method") == "group_limited_greedy"
    )
    if limited and config["n_group"] > 1:
        size = len(selection) // config["n_group"]
        groups = {g: selection[g * size : (g + 1) * size] for g in range(config["n_group"])}
        near, gap = best(
            {g: strength(group, config) for g, group in groups.items()}, config["topk_group"]
        )
        allowed = {e: value for e, value in allowed.items() if e // size in near}
    experts, last = best(allowed, config["num_experts_per_tok"])
    return experts, min(gap, last)


def route(logits: Tensor, bias: Tensor | None, config: Mapping[str, Any]) -> Choice:
    """Sigmoid affinities with a bias for the choice (V3), or probabilities (V2); gates are unbiased."""
    if config["model_type"] == "deepseek_v2":
        scores = torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum()
        experts, margin = choose(scores.tolist(), config)
        total = torch.ones((), dtype=torch.float64)
    else:
        scores = 1 / (1 + torch.exp(-logits))
        assert bias is not None
        experts, margin = choose((scores + bias).tolist(), config)
        total = (
            torch.stack([scores[e] for e in experts]).sum()
            if config["norm_topk_prob"]
            else torch.ones(())
        )
    return Choice(
        experts, [scores[e] / total * config["routed_scaling_factor"] for e in experts], margin
    )


class HFReference:
    """A whole checkpoint.

    Args:
        config: its config.json.
        tensors: its tensors by their names in the files; experts packed or not.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.rope = config, Rope.of(config)
        self.tensors = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}

    def logits(self, tokens: list[int]) -> Tensor:
        """Logits L x V of the main model."""
        return torch.stack([self.head() @ x for x in self.hidden(tokens)])

    def depth_logits(self, tokens: list[int], depths: int) -> list[Tensor]:
        """Logits (L - k) x V of the multi-token modules k = 1, 2, ...: row i predicts token i + k + 1.

        Report, eq. 21-23, with released weights: [enorm(embedding); hnorm(state)] goes through eh_proj; the state of
        depth 0 is the main model's after its final norm, and each depth hands on its normed output.
        """
        states, found = self.hidden(tokens), []
        for k in range(1, depths + 1):
            path = f"model.layers.{self.config['num_hidden_layers'] + k - 1}"
            joined = []
            for i in range(len(tokens) - k):
                embedded = self.norm(
                    f"{path}.enorm", self.tensors["model.embed_tokens.weight"][tokens[i + k]]
                )
                joined.append(torch.cat([embedded, self.norm(f"{path}.hnorm", states[i])]))
            xs = self.layer(path, [self.weight(f"{path}.eh_proj") @ x for x in joined])
            states = [self.norm(f"{path}.shared_head.norm", x) for x in xs]
            found.append(torch.stack([self.head() @ x for x in states]))
        return found

    def hidden(self, tokens: list[int]) -> list[Tensor]:
        """Each token's state after the final norm."""
        xs = [self.tensors["model.embed_tokens.weight"][token] for token in tokens]
        for number in range(self.config["num_hidden_layers"]):
            xs = self.layer(f"model.layers.{number}", xs)
        return [self.norm("model.norm", x) for x in xs]

    def head(self) -> Tensor:
        """The output matrix; the embedding's where the two are tied."""
        tied = self.config["tie_word_embeddings"]
        return self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def layer(self, path: str, xs: list[Tensor]) -> list[Tensor]:
        """Attention and feed-forward, each after a norm and beside a residual."""
        mixed = self.attention(
            f"{path}.self_attn", [self.norm(f"{path}.input_layernorm", x) for x in xs]
        )
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        normed = [self.norm(f"{path}.post_attention_layernorm", x) for x in xs]
        return [x + self.feed_forward(f"{path}.mlp", y) for x, y in zip(xs, normed, strict=True)]

    def attention(self, path: str, xs: list[Tensor]) -> list[Tensor]:
        """Report, eq. 1-11."""
        config = self.config
        nope, value, heads = (
            config["qk_nope_head_dim"],
            config["v_head_dim"],
            config["num_attention_heads"],
        )
        width, rank = nope + config["qk_rope_head_dim"], config["kv_lora_rank"]
        queries, keys, values = ([[] for _ in range(heads)] for _ in range(3))
        for position, x in enumerate(xs):
            q = self.queries(path, x)
            down = self.weight(f"{path}.kv_a_proj_with_mqa") @ x
            latent = self.norm(f"{path}.kv_a_layernorm", down[:rank], LATENT_EPS)
            shared_key = self.rope.turn(down[rank:], position)
            kv = self.weight(f"{path}.kv_b_proj") @ latent
            for i in range(heads):
                query, key_value = (
                    q[i * width : (i + 1) * width],
                    kv[i * (nope + value) : (i + 1) * (nope + value)],
                )
                queries[i].append(torch.cat([query[:nope], self.rope.turn(query[nope:], position)]))
                keys[i].append(torch.cat([key_value[:nope], shared_key]))
                values[i].append(key_value[nope:])
        scale, one_document = width**-0.5 * self.rope.temperature, [0] * len(xs)
        outputs = [
            causal(queries[i], keys[i], values[i], scale, one_document) for i in range(heads)
        ]
        return [
            self.weight(f"{path}.o_proj") @ torch.cat([head[t] for head in outputs])
            for t in range(len(xs))
        ]

    def queries(self, path: str, x: Tensor) -> Tensor:
        """All heads' queries of one token, through the query latent where there is one."""
        if self.config["q_lora_rank"] is None:
            return self.weight(f"{path}.q_proj") @ x
        latent = self.norm(f"{path}.q_a_layernorm", self.weight(f"{path}.q_a_proj") @ x, LATENT_EPS)
        return self.weight(f"{path}.q_b_proj") @ latent

    def feed_forward(self, path: str, x: Tensor) -> Tensor:
        """SwiGLU, or shared experts plus the gated outputs of the chosen ones (report, eq. 12)."""
        if f"{path}.gate.weight" not in self.tensors:
            return self.swiglu(path, x)
        choice = route(
            self.weight(f"{path}.gate") @ x,
            self.tensors.get(f"{path}.gate.e_score_correction_bias"),
            self.config,
        )
        y = self.swiglu(f"{path}.shared_experts", x)
        for expert, gate in zip(choice.experts, choice.gates, strict=True):
            y = y + gate * self.expert(f"{path}.experts", expert, x)
        return y

    def expert(self, path: str, expert: int, x: Tensor) -> Tensor:
        """One routed expert's output."""
        packed = self.tensors.get(f"{path}.gate_up_proj")
        if packed is None:
            return self.swiglu(f"{path}.{expert}", x)
        return swiglu(x, packed[expert], self.tensors[f"{path}.down_proj"][expert])

    def swiglu(self, path: str, x: Tensor) -> Tensor:
        """down(silu(gate x) * up x)."""
        gate_up = torch.cat([self.weight(f"{path}.gate_proj"), self.weight(f"{path}.up_proj")])
        return swiglu(x, gate_up, self.weight(f"{path}.down_proj"))

    def norm(self, path: str, x: Tensor, eps: float | None = None) -> Tensor:
        """RMSNorm with the configuration's epsilon, or another."""
        return rms_norm(x, self.weight(path), self.config["rms_norm_eps"] if eps is None else eps)

    def weight(self, path: str) -> Tensor:
        """A tensor called `weight`."""
        return self.tensors[f"{path}.weight"]
