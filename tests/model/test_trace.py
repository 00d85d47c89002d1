"""`core.trace`: what it returns equals slow code in fp64, for every attention and router, and it changes nothing."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import core
from core.contracts.errors import UserError
from core.extension.loader import installed_registry
from core.model.language_model import LanguageModel
from core.model.rope import rotate
from core.model.trace import Trace

from . import tiny

ROWS = [[5, 9, 200, 41, 7, 7, 12], [3, 250, 18], [77]]
ROUTERS = installed_registry().names("router")


def router_overrides(name: str) -> tuple[str, ...]:
    """The overrides that put a router into the tiny recipe."""
    if name == "deepseek_v3":
        return ()
    component, _ = installed_registry().find("router", name).load()
    section = json.dumps(component.example).replace('"', "")
    return (f"model.blocks.moe.ffn.router={section}", "model.blocks.moe.ffn.balance=[]")


@torch.no_grad()
def logits_by_hand(model: LanguageModel, path: str, x_BLD: Tensor, positions: Tensor) -> Any:
    """Queries and keys of every head of a block's attention, from its weights alone, as lists of vectors."""
    layer: Any = model.get_submodule(path).attention
    if hasattr(layer, "kv_down"):
        c = layer.config
        latent = None
        if c.q_rank is None:
            q = layer.q(x_BLD)
        else:
            latent = layer.q_norm(layer.q_down(x_BLD))
            q = layer.q_up(latent)
        q = q.unflatten(-1, (c.heads, -1))
        down = layer.kv_down(x_BLD)
        kv = layer.kv_norm(down[..., : c.kv_rank])
        up = layer.kv_up(kv).unflatten(-1, (c.heads, -1))[..., : c.nope_dim]
        turned = rotate(down[..., None, c.kv_rank :], layer.rope, positions)
        k = torch.cat([up, turned.expand(-1, -1, c.heads, -1)], dim=-1)
        turned = rotate(q[..., c.nope_dim :], layer.rope, positions)
        q = torch.cat([q[..., : c.nope_dim], turned], dim=-1)
        return q, k, {"key_value": kv} | ({} if latent is None else {"query": latent})
    q = rotate(layer.q(x_BLD).unflatten(-1, (layer.heads, -1)), layer.rope, positions)
    k = rotate(layer.k(x_BLD).unflatten(-1, (layer.kv_heads, -1)), layer.rope, positions)
    return q, k, {}


def traced(model: LanguageModel, rows: list[list[int]]) -> tuple[Trace, dict[str, Tensor]]:
    """A trace, and the input of every attention in the same forward."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for path, name, layer in model.block_layers():
        if name == "attention":

            def keep(_: Any, given: Any, path: str = path) -> None:
                inputs[path] = given[0]

            handles.append(layer.register_forward_pre_hook(keep))
    found = core.trace(model, rows)
    for handle in handles:
        handle.remove()
    return found, inputs


@pytest.mark.parametrize("attention", tiny.ATTENTIONS)
def test_latents_and_largest_logits_are_those_of_a_loop(attention: str) -> None:
    model = tiny.build(*tiny.ATTENTIONS[attention], *tiny.MTP)
    found, inputs = traced(model, ROWS)
    assert set(found.blocks) == set(inputs)
    assert len([path for path in inputs if path.startswith("heads.mtp")]) == 2
    for path, block in found.blocks.items():
        positions = block.context.positions_BL
        q, k, latents = logits_by_hand(model, path, inputs[path], positions)
        module: Any = model.get_submodule(path)
        scale = float(module.attention.scale)
        share = q.shape[2] // k.shape[2]
        assert set(block.attention.latents) == set(latents)
        for name, latent in latents.items():
            torch.testing.assert_close(block.attention.latents[name], latent, rtol=0, atol=1e-12)
        most = [-math.inf] * q.shape[2]
        for b, t in block.context.valid().nonzero().tolist():
            for h in range(q.shape[2]):
                logits = [float(q[b, t, h] @ k[b, s, h // share]) * scale for s in range(t + 1)]
                assert block.attention.max_logit_BLH is not None
                assert float(block.attention.max_logit_BLH[b, t, h]) == pytest.approx(max(logits))
                most[h] = max(most[h], *logits)
        assert block.max_logit is not None
        assert block.max_logit.tolist() == pytest.approx(most, rel=1e-12)


def test_sparse_attention_shows_the_largest_logit_of_the_selected_positions() -> None:
    model = tiny.build(*tiny.SPARSE)
    found, inputs = traced(model, ROWS[:1])
    layer: Any = model.blocks[0].attention
    q, k, _ = logits_by_hand(model, "blocks.0", inputs["blocks.0"], found.context.positions_BL)
    with torch.no_grad():
        projected = layer.project(inputs["blocks.0"])
        keys = layer.indexer.keys(inputs["blocks.0"], found.context, decoding=False)
        scores = layer._scores(inputs["blocks.0"], projected, keys, found.context, decoding=False)
    shown = found.blocks["blocks.0"].attention.max_logit_BLH
    assert shown is not None
    for t in range(7):
        order = sorted(range(t + 1), key=lambda s: (-float(scores[0, t, s]), s))[:3]
        for h in range(4):
            largest = max(float(q[0, t, h] @ k[0, s, h]) * layer.scale for s in order)
            assert float(shown[0, t, h]) == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
def test_routings_are_the_routers_own_and_count_the_records_loads(router: str) -> None:
    model = tiny.build(*router_overrides(router), *tiny.MTP)
    found = core.trace(model, ROWS)
    with torch.no_grad():
        records = model.eval()(found.context).expert_records()
    assert set(found.routings) == set(model.expert_layers()) == set(records)
    for path, record in records.items():
        load_E = found.blocks[path].load
        assert load_E is not None
        assert record.load_E is not None
        assert load_E.tolist() == record.load_E.tolist()
        routing = found.routings[path]
        valid = found.blocks[path].context.valid().flatten()
        by_hand = [0] * len(load_E)
        pairs = zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True)
        for token, expert in pairs:
            by_hand[expert] += int(valid[token])
        assert by_hand == load_E.tolist()


def test_a_padded_sequence_is_traced_as_by_itself() -> None:
    model = tiny.build()
    together = core.trace(model, ROWS)
    for index, row in enumerate(ROWS):
        alone = core.trace(model, row)
        for path, block in together.blocks.items():
            own = alone.blocks[path]
            latent = own.attention.latents["key_value"][0, : len(row)]
            both = block.attention.latents["key_value"][index, : len(row)]
            torch.testing.assert_close(both, latent, rtol=0, atol=1e-12)
            if block.routing is None:
                continue
            assert own.routing is not None
            choices = own.routing.choices
            length = together.context.tokens_BL.shape[1]
            start = index * length * choices
            chosen = block.routing.expert_A[start : start + len(row) * choices]
            assert chosen.tolist() == own.routing.expert_A[: len(row) * choices].tolist()


@pytest.mark.parametrize("router", ROUTERS)
def test_tracing_changes_nothing_of_the_model(router: str) -> None:
    model = tiny.build(*router_overrides(router), *tiny.MTP)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = core.trace(model, ROWS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not found.blocks["blocks.1"].routing.gate_A.requires_grad  # type: ignore[union-attr]


def test_a_dense_model_has_latents_and_no_routing() -> None:
    found = core.trace(tiny.build(*tiny.DENSE), ROWS)
    assert not found.routings
    assert all(block.experts == 0 and block.load is None for block in found.blocks.values())
    assert "query" in found.blocks["blocks.0"].attention.latents


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [([], "at least one token"), ([[1], []], "at least one token"), ([300], "from 0 to 299")],
)
def test_tokens_that_cannot_be_read_are_refused(tokens: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        core.trace(tiny.build(), tokens)
