"""Decoding inside the model: absorbed attention, fixed caches, few tokens and their experts, kept operands."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.contracts.context import SequenceContext
from core.generation.completion import complete
from core.generation.decoder import Decoder
from core.model import absorbed, latent_attention
from core.model.attend import TensorCache
from core.model.language_model import LanguageModel
from core.numerics.chosen import chosen_products
from core.numerics.grouped import grouped_product
from core.numerics.linear import ProductLayer
from model import tiny
from plugins.deepseek_moe import chosen

LENGTHS = (9, 13, 11)
EIGHTS = (
    "model.attention.nope_dim=16",
    "model.attention.rope_dim=8",
    "model.attention.value_dim=16",
    f"{tiny.FFN}.expert_hidden=16",
)
"""Every width a multiple of 8: in bf16 16 bytes, which `F.grouped_mm` asks for."""
YARN = "model.rope.yarn={factor: 4, original_length: 16, mscale: 1.0, mscale_all_dim: 0.7}"
MODELS = {
    "mla": (),
    "no query latent": ("model.attention.q_rank=null",),
    "yarn": (YARN, "model.rope.max_length=64"),
    "gqa": tiny.ATTENTIONS["gqa"],
    "sparse": tiny.SPARSE,
}
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}


def absorbed_by_hand(
    q_LHN: Tensor, q_LHR: Tensor, latent_SC: Tensor, k_SR: Tensor, up_HWC: Tensor, scale: float
) -> Tensor:
    """SPEC 1.8, one query, head and cached token after the other; the last query sees all, each before it one less."""
    new, heads, nope = q_LHN.shape
    seen = len(latent_SC)
    o_LHV = torch.zeros(new, heads, up_HWC.shape[1] - nope, dtype=q_LHN.dtype)
    for i in range(new):
        for h in range(heads):
            q_C = up_HWC[h, :nope].T @ q_LHN[i, h]
            visible = seen - new + i + 1
            scores = [
                float(q_C @ latent_SC[j] + q_LHR[i, h] @ k_SR[j]) * scale for j in range(visible)
            ]
            powers = [math.exp(score - max(scores)) for score in scores]
            mixed_C = sum(power / sum(powers) * latent_SC[j] for j, power in enumerate(powers))
            o_LHV[i, h] = up_HWC[h, nope:] @ mixed_C
    return o_LHV


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fused", [True, False])
def test_A1_attention_to_latents_is_the_specified_one(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:  # the path of other devices than CPUs
        monkeypatch.setattr(absorbed, "has_fused_kernel", lambda device: False)
    new, heads, nope, rope, latent, value, seen = 2, 3, 5, 4, 7, 6, 9
    q_LHN, q_LHR = random(new, heads, nope), random(new, heads, rope, seed=1)
    cached_SX, up_HWC = random(seen, latent + rope, seed=2), random(heads, nope + value, latent)
    mask_LS = torch.arange(seen) <= torch.arange(seen - new, seen)[:, None]
    mask_BAS = mask_LS.repeat_interleave(heads, dim=0)[None]
    found = absorbed.attend_to_latents(
        q_LHN[None], q_LHR[None], cached_SX[None], up_HWC, 0.3, mask_BAS
    )
    expected = absorbed_by_hand(q_LHN, q_LHR, *cached_SX.split([latent, rope], 1), up_HWC, 0.3)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_the_break_even_of_absorption_with_deepseek_v3s_widths() -> None:
    """512 x 256 / (2 x 512 - 256) = 170.7 new tokens with a cache without end."""
    paying = [new for new in range(1, 400) if absorbed.absorption_pays(new, 10**9, 512, 128 + 128)]
    assert paying == list(range(1, 171))
    assert not absorbed.absorption_pays(8, 8, 512, 256), "nothing is cached before a prompt"


@torch.no_grad()
def decode_rows(model: LanguageModel, tokens_BL: Tensor, *, constant: bool) -> Tensor:
    """The logits of each row's last four tokens: rows of different lengths, one new token, then three at once."""
    caches = model.new_caches(len(LENGTHS), 20)
    for cache in caches:
        cache.constant_shapes = constant
    lengths_B = torch.tensor(LENGTHS)
    model.decode(tokens_BL[:, : max(LENGTHS)], caches)
    for cache in caches:
        cache.truncate(lengths_B)
    last_BL = torch.stack(
        [row[length : length + 4] for row, length in zip(tokens_BL, LENGTHS, strict=True)]
    )
    first_BLV = model.decode(last_BL[:, :1], caches)
    return torch.cat([first_BLV, model.decode(last_BL[:, 1:], caches)], dim=1)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_A1_decoded_rows_have_the_logits_of_the_full_forward(
    precision: str, name: str, constant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tiny.Calls(absorbed.attend_to_latents)
    monkeypatch.setattr(latent_attention, "attend_to_latents", calls)
    model = tiny.build(*MODELS[name], f"precision.name={precision}").eval()
    tokens_BL = tiny.context(3, 17).tokens_BL
    found_BLV = decode_rows(model, tokens_BL, constant=constant)
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            full_LV = model.logits(tokens_BL[row : row + 1, : length + 4])[0, length:]
        tolerance = TOLERANCE[precision] * float(full_LV.abs().max())
        torch.testing.assert_close(found_BLV[row], full_LV, rtol=0, atol=tolerance)
    assert calls.count == (0 if name == "gqa" else 6), "two steps of three layers"


@pytest.mark.parametrize("precision", ["bf16_emulated", "fp8_emulated"])
def test_a_product_that_is_not_plain_is_called_for_every_latent(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_attention, "attend_to_latents", None)
    model = tiny.build(f"precision={{name: {precision}}}").eval()
    tokens_BL = tiny.context(1, 10).tokens_BL
    caches = model.new_caches(1, 10)
    with torch.no_grad():
        full_BLV = model.logits(tokens_BL)
        model.decode(tokens_BL[:, :9], caches)
        last_BLV = model.decode(tokens_BL[:, 9:], caches)
    torch.testing.assert_close(last_BLV, full_BLV[:, 9:], rtol=1e-4, atol=1e-4)


def test_cache_bytes_are_those_of_the_papers_formula() -> None:
    """SPEC 1.9: MHA 2 n_h d_h, GQA 2 n_g d_h, MQA 2 d_h, MLA d_c + d_h^R elements for each token and layer."""
    by_hand = {"mha": 2 * 4 * 8, "gqa": 2 * 2 * 8, "mqa": 2 * 8, "mla": 16 + 4}
    for name, elements in by_hand.items():
        model = tiny.build(*tiny.ATTENTIONS[name])
        caches = model.new_caches(3, 20)
        with torch.no_grad():
            model.decode(tiny.context(3, 5).tokens_BL, caches)
        assert [cache.bytes for cache in caches] == [3 * 20 * elements * 8] * 3, name


def test_a_caches_buffers_are_allocated_once() -> None:
    cache = TensorCache(2, 6)
    (whole,) = cache.append(random(2, 4, 3))
    cache.truncate(torch.tensor([2, 4]))
    (again,) = cache.append(random(2, 1, 3, seed=1))
    cache.constant_shapes = True
    (constant,) = cache.append(random(2, 1, 3, seed=2))
    assert whole.data_ptr() == again.data_ptr() == constant.data_ptr()
    assert cache.lengths.tolist() == [4, 6]
    assert cache.longest == 6
    with pytest.raises(ValueError, match="6 tokens and 1 more do not fit into a cache of 6"):
        cache.advance(1)


# ---- few tokens and their experts


def test_chosen_products_are_those_of_sorted_rows() -> None:
    x_AI, weight_EOI = random(7, 4), random(5, 3, 4, seed=1)
    expert_A = torch.tensor([4, 0, 0, 3, 4, 1, 0])
    sorted_A, order_A = expert_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(5), right=True)
    expected = torch.empty(7, 3, dtype=torch.float64)
    expected[order_A] = grouped_product(x_AI[order_A], weight_EOI, ends_E)
    found = chosen_products(x_AI, weight_EOI, expert_A)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("precision", ["fp64", "bf16_emulated"])
def test_few_tokens_have_the_output_of_sorted_rows(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an emulated format, whose products are not plain, sorted rows are used for few tokens too."""
    layer = tiny.moe(tiny.build(f"precision={{name: {precision}}}")).eval()
    calls = tiny.Calls(chosen.gated_experts)
    monkeypatch.setattr("plugins.deepseek_moe.chosen.gated_experts", calls)
    x_BLD = random(2, 3, 32).to(layer.routed.down.weight.dtype)
    tokens_BL = torch.zeros(2, 3, dtype=torch.int64)
    expected, record = layer(x_BLD, SequenceContext.of(tokens_BL))
    assert calls.count == 0
    assert int(record.load_E.sum()) == 12
    found, nothing = layer(x_BLD, SequenceContext.of(tokens_BL, recorded=False))
    assert nothing is None
    assert calls.count == (1 if precision == "fp64" else 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_training_counts_its_load_whoever_reads_it() -> None:
    layer = tiny.moe(tiny.build()).train()
    context = SequenceContext.of(torch.zeros(1, 1, dtype=torch.int64))
    assert int(layer(random(1, 1, 32), context)[1].load_E.sum()) == 2


# ---- operands that are kept in the product's format


def short_layers(model: LanguageModel) -> Iterator[ProductLayer]:
    """The layers whose weights are cast for every product."""
    for module in model.modules():
        if isinstance(module, ProductLayer) and module.weight.dtype != module.compute_dtype:
            yield module


def test_kept_operands_change_no_bit_and_follow_the_weights() -> None:
    model = tiny.build("precision={name: bf16}").eval()
    tokens_BL = tiny.context().tokens_BL
    with torch.no_grad():
        before = model.logits(tokens_BL)
        for layer in short_layers(model):
            layer.keep_operand()
            layer.reads_copy = True
            assert layer.operand().data_ptr() == layer.operand().data_ptr()
        assert torch.equal(model.logits(tokens_BL), before)
        for layer in short_layers(model):
            layer.reads_copy = False
    model.logits(tokens_BL).float().sum().backward()
    assert all(layer.weight.grad is not None for layer in short_layers(model)), "training casts"
    with torch.no_grad():
        for layer in short_layers(model):
            layer.weight.mul_(1.5)
        after = model.logits(tokens_BL)
    assert not torch.equal(after, before)
    for layer in short_layers(model):
        layer.reads_copy = True
        place = layer.operand().data_ptr()
        layer.keep_operand()
        assert layer.operand().data_ptr() == place, "graphs read this address"
        assert torch.equal(layer.operand(), layer.weight.to(torch.bfloat16))


# ---- what a CUDA graph needs


class NoReadsByTheHost(TorchDispatchMode):
    """Raises where the host reads a number from a tensor, which waits for a GPU and cannot be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            refuse()
        return func(*args, **(kwargs or {}))


def refuse(*_: Any) -> None:
    """Raises; in the place of what the mode cannot see."""
    raise AssertionError("the host reads a number")


@pytest.mark.parametrize("name", ["mla", "gqa", "sparse"])
@pytest.mark.parametrize("new", [1, 3])
def test_a_step_of_constant_shapes_reads_no_number_on_the_host(
    new: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the functions of other devices, on the CPU: the results are the same, and replays would advance alike."""
    monkeypatch.setattr(absorbed, "has_fused_kernel", lambda device: False)
    monkeypatch.setattr("core.numerics.chosen.on_host", lambda tensor: False)
    model = tiny.build(*MODELS[name]).eval()
    tokens_BL = tiny.context(3, 12 + new).tokens_BL
    caches = model.new_caches(3, 20)
    with torch.no_grad():
        full_BLV = model.logits(tokens_BL)
        model.decode(tokens_BL[:, :12], caches)
        for cache in caches:
            cache.constant_shapes = True
        monkeypatch.setattr(Tensor, "tolist", refuse)
        with NoReadsByTheHost():
            found_BLV = model.decode(tokens_BL[:, 12:], caches)
    monkeypatch.undo()
    torch.testing.assert_close(found_BLV, full_BLV[:, 12:], rtol=1e-10, atol=1e-10)
    assert [cache.lengths.tolist() for cache in caches] == [[12 + new] * 3] * 3


# ---- text, and a GPU


def greedy_by_full_forwards(model: LanguageModel, prompt: list[int], tokens: int) -> list[int]:
    """The most likely tokens, each from a forward over all tokens before it."""
    text = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("name", ["mla", "gqa"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_greedy_text_is_that_of_full_forwards(precision: str, name: str) -> None:
    """In fp32 up to a first difference, where the two best logits are less than 1e-4 apart."""
    model = tiny.build(*MODELS[name], f"precision.name={precision}").eval()
    prompts = tiny.context(3, 9).tokens_BL.tolist()
    completions = list(complete(model, [prompts[0], prompts[1][:4], prompts[2]], tokens=24))
    for prompt, completion in zip(
        [prompts[0], prompts[1][:4], prompts[2]], completions, strict=True
    ):
        expected = greedy_by_full_forwards(model, prompt, 24)
        if precision == "fp64":
            assert completion.tokens == expected
        for place, (ours, other) in enumerate(zip(completion.tokens, expected, strict=True)):
            if ours != other:
                before = torch.tensor([[*prompt, *expected[:place]]])
                with torch.no_grad():
                    first, second = model.logits(before)[0, -1].topk(2).values.tolist()
                assert first - second < 1e-4
                break


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
@pytest.mark.parametrize("name", ["mla", "no query latent", "yarn", "gqa"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_graphs_on_a_gpu_have_the_logits_of_the_full_forward(
    precision: str, tolerance: float, name: str
) -> None:
    """Rows of different lengths, steps of one and of three tokens, each recorded once and replayed."""
    widths = EIGHTS if name != "gqa" else EIGHTS[-1:]
    model = tiny.build(*widths, *MODELS[name], f"precision={{name: {precision}}}").eval().cuda()
    tokens_BL = tiny.context(3, 30).tokens_BL
    prompts = [row[:length] for row, length in zip(tokens_BL.tolist(), LENGTHS, strict=True)]
    rest_BL = torch.stack(
        [row[length : length + 12] for row, length in zip(tokens_BL, LENGTHS, strict=True)]
    ).cuda()
    decoder = Decoder(model, 3, 32)
    assert decoder.steps is not None, "the steps are recorded"
    found = [decoder.prefill(prompts).logits_BLV]
    for begin, end in ((0, 1), (1, 2), (2, 5), (5, 8), (8, 9), (9, 12)):
        found.append(decoder.step(rest_BL[:, begin:end]).logits_BLV)
    found_BLV = torch.cat(found, dim=1).double()
    assert set(decoder.steps._steps) == {1, 3}
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            full_LV = model.logits(tokens_BL[row : row + 1, : length + 12].cuda())[0, length - 1 :]
        difference = (found_BLV[row] - full_LV.double()).norm() / full_LV.double().norm()
        assert float(difference) <= tolerance
