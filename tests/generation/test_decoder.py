"""Rows that are read together have what each has alone, and both have the full forward's logits."""

import pytest
import torch
from model import tiny
from tiers import first_by_default

from core.generation.decoder import Decoder
from core.model.language_model import LanguageModel

PROMPTS = ([5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [250, 3])
MORE = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34], [41, 42, 43, 44]])


def full_logits(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """The logits V after the last of some tokens, from one forward over all of them."""
    with torch.no_grad():
        return model.logits(torch.tensor([tokens]))[0, -1]


@pytest.mark.parametrize("attention", first_by_default(list(tiny.ATTENTIONS)))
def test_prompts_of_different_lengths_have_the_logits_of_the_full_forward(attention: str) -> None:
    model = tiny.build(*tiny.ATTENTIONS[attention]).eval()
    decoder = Decoder(model, len(PROMPTS), 16)
    first_BV = decoder.prefill(PROMPTS).logits_BLV[:, 0]
    assert decoder.lengths == [3, 1, 9, 2]
    chunk_BLV = decoder.step(MORE[:, :3]).logits_BLV
    last_BLV = decoder.step(MORE[:, 3:]).logits_BLV
    found_BLV = torch.cat([first_BV[:, None], chunk_BLV, last_BLV], dim=1)
    for row, prompt in enumerate(PROMPTS):
        for count in range(5):
            expected_V = full_logits(model, [*prompt, *MORE[row, :count].tolist()])
            torch.testing.assert_close(found_BLV[row, count], expected_V, rtol=1e-10, atol=1e-10)
