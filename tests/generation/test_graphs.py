"""Recorded steps, with a recorder of the host in the place of CUDA graphs: the same steps, on the same addresses."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, ref

import pytest
import torch
from model import tiny

from core.generation import graphs
from core.generation.decoder import Decoder
from core.model.attend import TensorCache

PROMPTS = ([5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9])


class HostRecorder:
    """Records by keeping the function: a replay runs it and, as a graph, leaves what the host counts alone."""

    def __init__(self) -> None:
        self.records = 0
        self.replays = 0
        self.caches: WeakSet[TensorCache] = WeakSet()

    def __call__(
        self, function: Callable[[], None], take_back: Callable[[], None]
    ) -> Callable[[], None]:
        self.records += 1
        function()
        take_back()

        def replay() -> None:
            self.replays += 1
            counted = [(cache, cache._counts) for cache in self.caches]
            for cache in self.caches:
                cache.constant_shapes = True
            function()
            for cache, counts in counted:
                cache.constant_shapes = False
                cache._counts = counts

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> HostRecorder:
    """Makes decoders on the CPU record their steps."""
    made = HostRecorder()
    create = TensorCache.__init__

    def create_and_note(cache: TensorCache, *arguments: Any) -> None:
        create(cache, *arguments)
        made.caches.add(cache)

    monkeypatch.setattr(TensorCache, "__init__", create_and_note)
    monkeypatch.setattr(graphs, "is_recordable", lambda model, device: True)
    monkeypatch.setattr(graphs, "record_cuda_graph", made)
    return made


def decoded(model: Any) -> torch.Tensor:
    """The logits of steps of 1, 3 and 1 new tokens for rows of different lengths; one row takes nothing of the last."""
    decoder = Decoder(model, len(PROMPTS), 20)
    found = [decoder.prefill(PROMPTS).logits_BLV]
    more_BL = torch.arange(15).view(3, 5)
    found.append(decoder.step(more_BL[:, :1]).logits_BLV)
    three_BLV = decoder.step(more_BL[:, 1:4], [3, 1, 2]).logits_BLV.clone()
    three_BLV[1, 1:] = 0  # padding, whose logits have no meaning
    three_BLV[2, 2:] = 0
    found.append(three_BLV)
    last_BLV = decoder.step(more_BL[:, 4:], [1, 0, 1]).logits_BLV.clone()
    last_BLV[1] = 0
    found.append(last_BLV)
    assert decoder.lengths == [8, 3, 13]
    assert decoder.caches[0].lengths.tolist() == decoder.lengths
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("attention", [(), tiny.SPARSE])
def test_replayed_steps_have_the_logits_of_the_others(
    recorder: HostRecorder, attention: tuple[str, ...]
) -> None:
    model = tiny.build(*attention).eval()
    replayed_BLV = decoded(model)
    assert (recorder.records, recorder.replays) == (2, 3), "steps of 1 and of 3 new tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "is_recordable", lambda model, device: False)
        expected_BLV = decoded(model)
    torch.testing.assert_close(replayed_BLV, expected_BLV, rtol=1e-11, atol=1e-11)
    assert recorder.replays == 3


def test_the_next_decoder_gets_the_steps_until_the_weights_change(recorder: HostRecorder) -> None:
    model = tiny.build().eval()
    first_BLV = decoded(model)
    assert torch.equal(decoded(model), first_BLV)
    assert recorder.records == 2
    beside = Decoder(model, len(PROMPTS), 20)
    other = Decoder(model, len(PROMPTS), 20)
    assert beside.caches[0] is not other.caches[0], "both live"
    with torch.no_grad():
        model.output.weight.mul_(2.0)
    torch.testing.assert_close(decoded(model), first_BLV * 2, rtol=1e-11, atol=1e-11)
    assert recorder.records == 4


def test_a_model_that_cannot_be_recorded_is_decoded_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, recorder: HostRecorder
) -> None:
    def fail(function: Callable[[], None], take_back: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny.build().eval()
    expected_BLV = decoded(model)
    monkeypatch.setattr(graphs, "record_cuda_graph", fail)
    with torch.no_grad():
        model.norm.weight.mul_(1.0)  # written to: recorded anew
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        found_BLV = decoded(model)
    torch.testing.assert_close(found_BLV, expected_BLV, rtol=1e-11, atol=1e-11)
    assert recorder.records == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_emulated"])
def test_only_plain_products_are_recorded(precision: str) -> None:
    model = tiny.build(f"precision={{name: {precision}}}")
    assert graphs.is_recordable(model, torch.device("cuda")) == (precision != "fp8_emulated")
    assert not graphs.is_recordable(model, torch.device("cpu"))


def test_idle_steps_do_not_keep_a_model_alive(
    recorder: HostRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder of the host holds the function that it repeats; a graph holds kernels, as this one does not even."""

    def record(function: Callable[[], None], take_back: Callable[[], None]) -> Callable[[], None]:
        function()
        take_back()
        recorder.records += 1
        return lambda: None

    monkeypatch.setattr(graphs, "record_cuda_graph", record)
    model = tiny.build().eval()
    watched = ref(model)
    decoder = Decoder(model, 1, 4)
    decoder.prefill([[5]])
    decoder.step(torch.tensor([[2]]))
    del decoder
    assert recorder.records == 1
    assert len(graphs._idle[model]) == 1
    del model
    gc.collect()
    assert watched() is None


def test_an_optimizers_step_is_noticed_though_fused_ones_leave_no_trace(
    recorder: HostRecorder,
) -> None:
    """The shipped optimizer is fused: the versions of the weights that it has changed are what they were."""
    model = tiny.build("precision={name: bf16}").eval()
    decoded(model)
    tokens_BL = torch.tensor([[5, 9, 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    fresh = tiny.build("precision={name: bf16}").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.logits(tokens_BL), fresh.logits(tokens_BL))
    assert torch.equal(decoded(model), decoded(fresh))


def test_only_a_few_idle_caches_are_kept(recorder: HostRecorder) -> None:
    model = tiny.build().eval()
    for rows in range(1, 8):
        Decoder(model, rows, 4)
    assert len(graphs._idle[model]) == graphs.MOST_IDLE


def test_a_layer_that_sees_the_padding_is_not_recorded() -> None:
    """Experts that choose tokens would choose among finished rows too."""
    router = "{name: expert_choice, top_k: 2, group: batch}"
    moe = "model.blocks.moe.ffn"
    model = tiny.build(f"{moe}.router={router}", f"{moe}.balance=[]")
    assert not graphs.is_recordable(model, torch.device("cuda"))
