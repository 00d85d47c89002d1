"""What every routing strategy must survive: recomputation, compilation, saving, a longer run of draws."""

import hashlib

import pytest
import torch

from core.contracts.errors import UserError
from core.routing.chance import Chance, uniform

from . import tiny

PLAIN = f"{tiny.FFN}.balance=[]"
STRATEGIES = {
    "deepseek_v2": "{name: deepseek_v2, top_k: 2, groups: 2, group_limit: 1}",
    "gshard": "{name: gshard, capacity_factor: 0.8}",
    "gshard_dropless": "{name: gshard_dropless}",
    "switch": "{name: switch, capacity_factor: 0.8, jitter: 0.1}",
    "expert_choice": "{name: expert_choice, top_k: 2}",
    "expert_choice in chunks": "{name: expert_choice, top_k: 2, group: sequence, chunk: 3}",
    "hash": "{name: hash}",
    "hash_gated": "{name: hash_gated, top_k: 3}",
    "forced_balance": "{name: forced_balance, top_k: 3}",
    "token dropping": "{name: deepseek_v3, top_k: 2}",
}
EVERY = pytest.mark.parametrize("name", STRATEGIES)


def overrides(name: str) -> tuple[str, ...]:
    """The tiny recipe with one strategy, and DeepSeek-V2's dropping in the case of that name."""
    dropping = f"{tiny.FFN}.token_dropping={{devices: 2, keep_sequences: 0.5}}"
    more = (dropping,) if name == "token dropping" else ()
    return (f"{tiny.ROUTER}={STRATEGIES[name]}", PLAIN, *more)


@pytest.mark.parametrize("name", ["gshard", "switch", "token dropping"])
def test_P2_recomputation_changes_no_bit(name: str) -> None:
    """Losses, loads, drops and gradients of the strategies that draw or drop."""
    given, results = tiny.context(3, 9, step=5, first_sequence=2), []
    for more in ((), ("recompute.blocks=[dense, moe]",)):
        model = tiny.build(*tiny.MTP, *overrides(name), *more)
        losses = model(given)
        dropped = {path: record.dropped for path, record in losses.expert_records().items()}
        seen = tiny.seen(model, given, losses)
        results.append((dropped, seen.loads, tiny.backward(model, seen.total())))
    for plain, recomputed in zip(*results, strict=True):
        tiny.assert_equal(recomputed, plain)


@pytest.mark.full
@EVERY
def test_P42_compiled_blocks_give_the_same(name: str) -> None:
    """Also in a later step: what is drawn follows the step, not the graph."""
    torch._dynamo.reset()
    one = ("model.blocks.dense.count=0", "model.blocks.moe.count=1")
    plain, compiled = (tiny.build(*overrides(name), *one) for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="eager")
    for step in (0, 1):
        given = tiny.context(2, 8, step=step)
        expected, seen = tiny.see(plain, given), tiny.see(compiled, given)
        tiny.assert_equal(seen.loads, expected.loads)
        tiny.assert_close(
            tiny.backward(compiled, seen.total()), tiny.backward(plain, expected.total()), 1e-11
        )


@EVERY
def test_the_state_round_trips(name: str) -> None:
    model, other = tiny.build(*overrides(name)), tiny.build(*overrides(name))
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(model.state_dict())
    given = tiny.context()
    tiny.assert_equal(tiny.see(other.eval(), given).loads, tiny.see(model.eval(), given).loads)
    tokens_BL = given.tokens_BL
    assert torch.equal(other.logits(tokens_BL), model.logits(tokens_BL))


@EVERY
def test_bf16_models_route_in_fp32(name: str) -> None:
    model = tiny.build(*overrides(name), "precision.name=bf16")
    found = []
    tiny.moe(model).router.register_forward_hook(lambda _, __, routing: found.append(routing))
    tiny.see(model, tiny.context()).total().backward()
    assert {
        tensor.dtype for tensor in (found[0].scores_TE, found[0].logits_TE, found[0].gate_A)
    } == {torch.float32}


# ---- hash tables


def test_a_balanced_table_needs_data_or_a_saved_table() -> None:
    model = tiny.build(f"{tiny.ROUTER}={{name: hash, map: balanced}}", PLAIN)
    with pytest.raises(UserError, match="token counts"):
        model.logits(torch.zeros(1, 4, dtype=torch.int64))
    donor = tiny.build(f"{tiny.ROUTER}={{name: hash, map: random}}", PLAIN)
    model.load_state_dict(donor.state_dict())
    tokens_BL = tiny.context().tokens_BL
    assert torch.equal(model.logits(tokens_BL), donor.logits(tokens_BL))


def test_random_tables_follow_seed_and_layer() -> None:
    def tables(*more: str) -> list[torch.Tensor]:
        model = tiny.build(f"{tiny.ROUTER}={{name: hash}}", PLAIN, *more)
        return [layer.router.table for layer in model.expert_layers().values()]

    one, two = tables()
    assert not torch.equal(one, two)
    assert torch.equal(tables()[0], one)
    assert not torch.equal(tables("seed=1")[0], one)
    assert set(one.tolist()) == set(range(8))


# ---- addresses of random numbers


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    """100,000 draws: mean and variance within 3 sigma, ten equal bins, no correlation between neighbours."""
    drawn = uniform(0, "test", torch.arange(100_000))
    assert drawn.dtype == torch.float64
    assert ((drawn >= 0) & (drawn < 1)).all()
    sigma = (1 / 12 / len(drawn)) ** 0.5
    assert abs(float(drawn.mean()) - 0.5) < 3 * sigma
    counts = drawn.mul(10).long().bincount(minlength=10)
    assert (
        float(((counts - 1e4) ** 2 / 1e4).sum()) < 27.9
    )  # chi squared, 9 degrees of freedom, p = 0.001
    centred = drawn - 0.5
    assert abs(float((centred[1:] * centred[:-1]).mean()) * 12) < 3 / len(drawn) ** 0.5


def test_an_address_has_every_part_of_a_place() -> None:
    """Seed, purpose, step, layer, sequence and position each change the number; the split of a batch does not."""
    given = tiny.context(4, 6, step=3, first_sequence=10)
    drawn = Chance(0, 1).of_tokens(given, "a")
    assert len(set(drawn.tolist())) == 24
    other = [
        Chance(1, 1).of_tokens(given, "a"),
        Chance(0, 2).of_tokens(given, "a"),
        Chance(0, 1).of_tokens(given, "b"),
    ]
    other.append(Chance(0, 1).of_tokens(tiny.context(4, 6, step=4, first_sequence=10), "a"))
    assert all(not (drawn == numbers).any() for numbers in other)
    last = tiny.context(2, 6, step=3, first_sequence=12)
    assert torch.equal(Chance(0, 1).of_tokens(last, "a"), drawn[12:])
    assert Chance(0, 1).of_tokens(given, "a", width=5).shape == (24, 5)


def test_the_numbers_are_those_of_splitmix64() -> None:
    """Integers modulo 2^64 are the same on every machine; another formula would change how trained models route."""
    words = int.from_bytes(hashlib.sha256(b"0:test").digest()[:8], "little") >> 1
    expected = []
    for place in (0, 1, 12345):
        state = words
        for coordinate in (place, 7):
            state = finalised((state + (coordinate + 1) * 0x9E3779B97F4A7C15) % 2**64)
        expected.append((state >> 11) / 2**53)
    assert uniform(0, "test", torch.tensor([0, 1, 12345]), torch.tensor(7)).tolist() == expected


def finalised(z: int) -> int:
    """The finalizer of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


# ---- settings that mean nothing together


V3 = "{name: deepseek_v3, top_k: 2, groups: 2, group_limit: null}"
IMPOSSIBLE = {
    "two biases": (
        (f"{tiny.FFN}.balance=[{{name: bias}}, {{name: bias}}]",),
        "balance.1.*two would add up",
    ),
    "a unit of a sign": (
        (f"{tiny.FFN}.balance=[{{name: bias, unit: fraction}}]",),
        "a sign has no unit",
    ),
    "a score of groups that are not limited": (
        (f"{tiny.ROUTER}={V3}", f"{tiny.ROUTER}.group_score=1"),
        "groups have no score otherwise",
    ),
    "dropping by affinity without affinities": (
        (f"{tiny.ROUTER}={{name: hash}}", PLAIN, f"{tiny.FFN}.token_dropping={{devices: 2}}"),
        "learns which experts to choose, and hash does not",
    ),
    "dropping on other devices": (
        (f"{tiny.FFN}.token_dropping={{devices: 4}}",),
        "must be the router's groups, 2",
    ),
    "a loss over another local group": (
        (
            f"{tiny.ROUTER}={{name: gshard, group: batch}}",
            f"{tiny.FFN}.balance=[{{name: gshard, alpha: 1.0}}]",
        ),
        "must be micro_batch or batch, the local group",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_settings_that_mean_nothing_together_are_refused(name: str) -> None:
    settings, why = IMPOSSIBLE[name]
    with pytest.raises(UserError, match=why):
        tiny.compose(*settings)
