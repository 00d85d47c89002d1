"""Rows that are read together have what each has alone, and both have the full forward's logits."""

from collections.abc import Sequence

import pytest
import torch
from model import tiny
from tiers import first_by_default

from core.contracts.errors import UserError
from core.generation.decoder import Decoder

from .slow import PROMPTS, next_logits

MORE = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]])
CAUSAL_ROUTERS = {
    "deepseek_v3": (),
    "deepseek_v2": (
        f"{tiny.ROUTER}={{name: deepseek_v2, top_k: 2, groups: 2, group_limit: 1}}",
        f"{tiny.BALANCE}=[{{name: expert, alpha: 0.01}}]",
    ),
    "dropless": (
        f"{tiny.ROUTER}={{name: gshard_dropless, top_k: 2}}",
        f"{tiny.BALANCE}=[{{name: z_loss, alpha: 0.001}}]",
    ),
    "hash": (f"{tiny.ROUTER}={{name: hash, map: random}}", f"{tiny.BALANCE}=[]"),
    "hash_gated": (
        f"{tiny.ROUTER}={{name: hash_gated, top_k: 2}}",
        f"{tiny.BALANCE}=[]",
        f"{tiny.FFN}.swiglu_limit=0.2",
    ),
}
COMBINATIONS = [(attention, router) for router in CAUSAL_ROUTERS for attention in tiny.ATTENTIONS]


@pytest.mark.parametrize("case", first_by_default(COMBINATIONS))
def test_ragged_rows_have_the_logits_of_the_full_forward(case: tuple[str, str]) -> None:
    """A prompt for each row in one pass, then a chunk, then one token."""
    attention, router = case
    model = tiny.build(*tiny.ATTENTIONS[attention], *CAUSAL_ROUTERS[router]).eval()
    decoder = Decoder(model, len(PROMPTS), 16)
    first_BLV = decoder.prefill(PROMPTS).logits_BLV
    assert first_BLV.shape == (4, 1, tiny.VOCABULARY)
    assert decoder.lengths == [3, 1, 9, 2]
    chunk_BLV = decoder.step(MORE[:, :3]).logits_BLV
    last_BLV = decoder.step(MORE[:, 3:]).logits_BLV
    found_BLV = torch.cat([first_BLV, chunk_BLV, last_BLV], dim=1)
    for row, prompt in enumerate(PROMPTS):
        for count in range(5):
            expected_V = next_logits(model, [*prompt, *MORE[row, :count].tolist()])
            torch.testing.assert_close(found_BLV[row, count], expected_V, rtol=1e-10, atol=1e-10)


def test_what_is_forgotten_leaves_no_trace() -> None:
    """Rejected tokens, rows that take fewer tokens than others, rows that take none."""
    model = tiny.build().eval()
    decoder = Decoder(model, 4, 24)
    decoder.prefill(PROMPTS)
    decoder.step(MORE)
    decoder.truncate([4, 1, 12, 99])
    assert decoder.lengths == [4, 1, 12, 6]
    decoder.step(MORE, counts=[2, 0, 1, 4])
    assert decoder.lengths == [6, 1, 13, 10]
    for cache in decoder.caches:
        assert cache.lengths.tolist() == decoder.lengths
    found_BV = decoder.step(MORE[:, 3:]).logits_BLV[:, 0]
    texts = [
        [*PROMPTS[0], 11, 11, 12, 14],
        [*PROMPTS[1], 24],
        [*PROMPTS[2], 31, 32, 33, 31, 34],
        [*PROMPTS[3], 41, 42, 43, 44, 41, 42, 43, 44, 44],
    ]
    for row, text in enumerate(texts):
        expected_V = next_logits(model, text)
        torch.testing.assert_close(found_BV[row], expected_V, rtol=1e-10, atol=1e-10)


def test_a_prompt_in_two_parts_is_the_prompt() -> None:
    model = tiny.build().eval()
    decoder = Decoder(model, 2, 16)
    decoder.prefill([[5, 9, 2], [7]])
    logits_BV = decoder.prefill([[4], [8, 3, 1]]).logits_BLV[:, 0]
    for row, text in enumerate([[5, 9, 2, 4], [7, 8, 3, 1]]):
        expected_V = next_logits(model, text)
        torch.testing.assert_close(logits_BV[row], expected_V, rtol=1e-10, atol=1e-10)


def test_the_output_layer_runs_for_one_token_of_each_prompt() -> None:
    model = tiny.build().eval()
    rows: list[int] = []
    model.output.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0][..., 0].numel()))
    decoder = Decoder(model, 4, 16)
    states_BLD = decoder.prefill(PROMPTS).hidden_BLD
    assert rows == [4]
    assert states_BLD.shape == (4, 9, 32), "drafting reads the states of all tokens"


@pytest.mark.parametrize("router", first_by_default(["gshard", "switch"]))
def test_padding_takes_no_capacity_and_another_row_neither(router: str) -> None:
    """With a capacity for each sequence a prompt is routed as it is alone, though not as token by token."""
    name = {
        "gshard": "{name: gshard, capacity_factor: 0.5, second: always}",
        "switch": "{name: switch, capacity_factor: 0.5, eval_capacity_factor: 0.5, group: sequence}",
    }[router]
    model = tiny.build(
        f"{tiny.ROUTER}={name}", f"{tiny.BALANCE}=[{{name: z_loss, alpha: 0.001}}]"
    ).eval()
    together_BV = Decoder(model, 4, 16).prefill(PROMPTS).logits_BLV[:, 0]
    for row, prompt in enumerate(PROMPTS):
        alone_V = Decoder(model, 1, 16).prefill([prompt]).logits_BLV[0, 0]
        torch.testing.assert_close(together_BV[row], alone_V, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone_V, next_logits(model, prompt), rtol=1e-10, atol=1e-10)


def test_padding_may_be_past_the_last_position_and_tokens_may_not() -> None:
    model = tiny.build("model.rope.max_length=16").eval()
    decoder = Decoder(model, 2, 24)
    decoder.prefill([list(range(14)), [7]])
    found_BLV = decoder.step(MORE[:2], counts=[2, 4]).logits_BLV
    assert decoder.lengths == [16, 5]
    _assert_last(found_BLV[0, 1], model, [*range(14), 11, 12])
    _assert_last(found_BLV[1, 3], model, [7, 21, 22, 23, 24])
    with pytest.raises(UserError, match=r"17 tokens are more than model\.rope\.max_length = 16"):
        decoder.step(MORE[:2, :1])


def _assert_last(found_V: torch.Tensor, model: object, text: Sequence[int]) -> None:
    torch.testing.assert_close(found_V, next_logits(model, text), rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


def test_lengths_for_another_number_of_rows_change_nothing() -> None:
    decoder = Decoder(tiny.build().eval(), 2, 8)
    decoder.prefill([[1, 2], [3]])
    with pytest.raises(ValueError, match="zip"):
        decoder.truncate([1])
    assert decoder.lengths == [2, 1]
    assert decoder.caches[0].lengths.tolist() == [2, 1]
