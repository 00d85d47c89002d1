"""benchmarks/gpu.py: its floors are counted as their definitions say, failures lose nothing, and it is one command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import core
from benchmarks import gpu
from benchmarks.on_gpu import compare, layer, measure, profile, shapes, speed, theirs
from core.analysis.size import size_of

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: Any) -> Any:
    """Runs the command without `torch.compile`, because compiling is slow and not tested here."""
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.fixture
def lab(tmp_path: Path) -> measure.Lab:
    rates = {"bf16": 1e12, "fp8": 2e12, "fp32": 5e11, "bytes": 1e10}
    return measure.Lab("cpu", True, tmp_path, rates)


def test_the_layers_layer_is_three_products_and_three_passes_over_the_weights(
    lab: measure.Lab,
) -> None:
    made, _, _ = layer.make_layer(lab, "even", "{name: fp32}", None)
    tokens, dim, hidden = 64, 64, 32
    rows = tokens * layer.TOP_K
    products = (
        3 * 2 * (rows * 3 * dim * hidden + tokens * 3 * dim * hidden + tokens * dim * layer.EXPERTS)
    )
    weights = 4 * (layer.EXPERTS * 3 * dim * hidden + 3 * dim * hidden + dim * layer.EXPERTS)
    found = layer.floors(made, lab)
    assert found["operations"] == products
    assert found["bytes"] == 3 * weights + 4 * 2 * tokens * dim
    assert found["bf16_operations_seconds"] == pytest.approx(products / 1e12)
    assert found["fp8_operations_seconds"] == pytest.approx(products / 2e12)
    assert found["bytes_seconds"] == pytest.approx(found["bytes"] / 1e10)


def test_the_layer_has_the_published_shape_where_it_is_not_a_toy(tmp_path: Path) -> None:
    """Reads the shape of DeepSeek-V3's layer: hidden 7168, experts of 2048, one shared; with 32 of its experts."""
    recipe = core.compose(
        "dsv3_671b", [f"model.blocks.moe.ffn.experts={layer.EXPERTS}", "model.blocks.moe.count=1"]
    )
    ffn = recipe.model.blocks["moe"].ffn.config
    assert (recipe.model.dim, ffn.expert_hidden, ffn.shared_experts, ffn.router.config.top_k) == (
        7168,
        2048,
        1,
        8,
    )


def test_the_billion_has_a_billion_parameters_and_attention_that_transformers_has() -> None:
    for name in ("1b", "1b_mla"):
        size = size_of(core.build(shapes.SHAPES[name].compose(), device="meta"))
        assert 0.9e9 < size.params_total < 1.2e9
    assert shapes.SHAPES[speed.BESIDE].compose().model.attention.name == "mla"


def test_shared_weights_are_the_same_tensors_and_step_as_one(lab: measure.Lab) -> None:
    recipe = shapes.SHAPES["1b"].compose("{name: fp32}", quick=True)
    one = shapes.Stepper.of(recipe, "cpu", compiled=False)
    other = shapes.Stepper.of(recipe, "cpu", compiled=False, owner=one)
    mine, theirs_too = dict(one.model.named_parameters()), dict(other.model.named_parameters())
    assert mine.keys() == theirs_too.keys()
    assert all(theirs_too[name] is tensor for name, tensor in mine.items())
    before = [tensor.detach().clone() for tensor in mine.values()]
    assert torch.equal(one.loss(), other.loss())
    other.step()
    assert any(
        not torch.equal(tensor, kept) for tensor, kept in zip(mine.values(), before, strict=True)
    )
    assert torch.equal(one.loss(), other.loss())


def test_transformers_gets_the_same_weights(lab: measure.Lab) -> None:
    """Compares loss and logits of both models in fp32 with weights that bf16 holds; other weights give others."""
    pytest.importorskip("transformers")
    recipe = shapes.SHAPES[speed.BESIDE].compose("{name: fp32}", quick=True)
    ours = shapes.Stepper.of(recipe, "cpu", compiled=False)
    with torch.no_grad():
        for weight in ours.model.parameters():
            weight.mul_(20 if weight.ndim > 1 else 1)  # else every loss is log V
            weight.copy_(weight.bfloat16())
    theirs.export(recipe, ours, lab.folder / "hf")
    there = theirs.Theirs(lab.folder / "hf", "eager", ours, "cpu")
    there.model.float()
    with torch.no_grad():
        assert float(there.loss()) == pytest.approx(float(ours.loss()), rel=1e-5)
        assert max(theirs.agreement(ours, there, recipe).values()) < 1e-9
        there.model.model.layers[1].mlp.experts.down_proj[0].mul_(-1)
        other = theirs.agreement(ours, there, recipe)
        assert other["ours_to_fp32"] < 1e-9 < 1e-3 < other["ours_to_theirs"]
    kept = there.masters
    there.step()
    there.forget()
    assert not there.optimizer.state
    assert there.masters is not kept


def test_fp32_masters_keep_what_bf16_rounds_away() -> None:
    """Takes steps too small for a bf16 weight, which add up in its master; gradients are clipped and dropped."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = theirs.Masters([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    own = torch.ones(4, requires_grad=True)
    right = torch.optim.AdamW([own], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.bfloat16)
        own.grad = torch.tensor([0.6, 0.8, 0.0, 0.0])
        masters.step()
        right.step()
        assert weight.grad is None
        torch.testing.assert_close(masters.masters[0], own)
        assert torch.equal(weight, own.bfloat16()), step
    assert weight[0] < 1


def test_flops_by_torchs_counter_are_those_of_the_convention(lab: measure.Lab) -> None:
    """The profile's floors against `size_of`, which MFU uses; routers and norms are what they leave out."""
    stepper = shapes.Stepper.of(
        shapes.SHAPES["1b_mla"].compose("{name: fp32}", quick=True), "cpu", compiled=False
    )
    counted = sum(profile._flops(stepper).values())
    assert counted == pytest.approx(stepper.flops, rel=0.15)


def test_kinds_of_kernels() -> None:
    """Sorts names that a profiler gave on an H100."""
    names = {
        "attention": "fmha_cutlassB_bf16_aligned_128x64_k65536_sm80(PyTorchMemEffAttention::AttentionBackwardKernel",
        "optimizer and norm": "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedOpti",
        "products": "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        profile.REST: "triton_poi_fused_cat_masked_fill_mul_silu_silu_backward_split_8",
    }
    for kind, name in names.items():
        assert profile.kind_of(name) == kind


def test_versions_take_turns_and_are_compared_round_by_round() -> None:
    called: list[str] = []
    found = measure.in_turns(
        {name: (lambda name=name: called.append(name)) for name in "abc"}, "cpu", rounds=3, warm=1
    )
    orders = ["".join(called[at : at + 3]) for at in range(0, 12, 3)]
    assert all(sorted(order) == list("abc") for order in orders)
    assert len(set(orders)) > 1
    assert all(len(spent["all"]) == 3 for spent in found.values())
    assert measure.ratio({"all": [2.0, 6.0]}, {"all": [1.0, 2.0]})["all"] == [2.0, 3.0]


def test_bits_differ_where_values_do_not() -> None:
    """Compares zeros of both signs, which differ, and NaNs, which do not."""
    one, two = torch.tensor([0.0, math.nan, 1.0]), torch.tensor([-0.0, -math.nan, 1.0])
    assert compare.differing(one, two) == 1
    assert compare.differing(one.bfloat16(), two.bfloat16()) == 1
    assert compare.differing(one, one) == 0


def test_rates_that_moved_are_reported() -> None:
    before = {"bf16": 100.0, "fp8": 200.0, "bytes": 10.0}
    assert measure.moved(before, before | {"fp8": 205.0}) == {}
    assert measure.moved(before, before | {"bf16": 50.0}) == {"bf16": -0.5}


def test_what_a_part_kept_before_it_failed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(lab: measure.Lab) -> dict[str, Any]:
        lab.keep({"first": {"value": 1}})
        raise ValueError("out of memory")

    monkeypatch.setattr(layer, "run", breaks)
    document: dict[str, Any] = {}
    arguments = gpu.parser().parse_args(
        ["layer", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    )
    rows = gpu.measured(
        "layer", arguments, document, tmp_path / "gpu.json", measure.ceilings("cpu", quick=True)
    )
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["layer"]["found"]
    assert found["first"] == {"value": 1}
    assert found["error"] == "ValueError: out of memory"
    assert "ValueError" in str(rows)
    assert gpu._errors(found) == ["ValueError: out of memory"]


def test_a_test_that_failed_is_a_failure() -> None:
    assert gpu._errors({"passed": 3, "broken": {"tests.x::test_y": "assert 1 == 2"}}) == [
        "tests.x::test_y: assert 1 == 2"
    ]


def test_a_failure_is_reported_and_loses_nothing_else() -> None:
    def broken() -> None:
        raise ValueError("no such kernel\nand more")

    found = {"good": 1, "bad": measure.attempt(broken), "list": [{"error": "x"}]}
    assert measure.failed(found["bad"]) == "ValueError: no such kernel"
    assert gpu._errors(found) == ["ValueError: no such kernel", "x"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence_says_what_is_possible(tmp_path: Path) -> None:
    done = run("layer", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "there is no GPU that torch can use; --device cpu --quick is a dry run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = run("speeed", "--quick", "--device", "cpu", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert (
        "speeed: is not a part; allowed: tests, correctness, fp8, speed, decode, layer, profile"
        in done.stderr
    )


def test_a_part_leaves_its_numbers_beside_those_of_others(tmp_path: Path) -> None:
    (tmp_path / "gpu-quick.json").write_text('{"speed": {"found": {}}}', encoding="utf-8")
    done = run("layer", "--quick", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "gpu-quick.json").read_text(encoding="utf-8"))
    assert document.keys() == {"speed", "layer"}
    about, found = document["layer"]["about"], document["layer"]["found"]
    assert about["command"] == "python benchmarks/gpu.py layer --quick --device cpu"
    assert about["packages"]["torch"] == torch.__version__
    assert found["even"]["max_vio"] == 0 < found["routed"]["max_vio"]
    assert found["even"]["forward_and_backward"].keys() == layer.VERSIONS.keys()
    assert "| layer | even: bf16 compiled | forward" in done.stdout
