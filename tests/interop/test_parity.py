"""Checkpoints of transformers, opened here: the same logits, the same experts, and the same bits on the way back.

Over configurations in which every two settings meet (`hf_models.AXES`). The loops of `hf_reference` are the third
witness: they are held to transformers where it is exact, and hold both it and us where it rounds.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from torch import Tensor

import core

from .hf_models import (
    AXES,
    BASE,
    FIXED_IN_V2,
    LAYERS,
    V2,
    V2_BASE,
    Case,
    covering,
    fill,
    in_dtype,
    meaning,
    random_model,
    random_tokens,
    read_config,
    read_tensors,
    save,
    transformers_or_skip,
)
from .hf_reference import HFReference, route
from .parity import EXACT, FP32, FP64, assert_near, assert_same_bits, assert_same_model, theirs

CASES = [
    *covering(),
    replace(BASE, config={"topk_group": 4}),  # groups that limit nobody
    replace(
        BASE.but(style="released"), config={"first_k_dense_replace": LAYERS}
    ),  # no layer with experts
    replace(V2_BASE, config={"first_k_dense_replace": LAYERS}),
    replace(BASE, config={"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    replace(
        BASE,
        config={"n_routed_experts": 32, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8},
    ),
]
TOKENS = random_tokens(2, 20)


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


@dataclass(frozen=True)
class Checkpoint:
    """A random model, its folders in several number formats, and the runs that `from-hf` makes of them."""

    case: Case
    model: Any
    lab: Lab
    root: Path

    def folder(self, dtype: torch.dtype) -> Path:
        path = self.root / str(dtype)
        return path if path.exists() else save(self.case, in_dtype(self.model, dtype), path)

    def run(self, dtype: torch.dtype) -> Path:
        path = self.root / f"run-{dtype}"
        if not path.exists():
            result = self.lab.command("convert", "from-hf", self.folder(dtype), path)
            assert result.code == 0, result.err
        return path

    @cached_property
    def reference(self) -> Tensor:
        """The loops' logits."""
        folder = self.folder(torch.float64)
        loops = HFReference(read_config(folder), read_tensors(folder))
        return torch.stack([loops.logits(tokens) for tokens in TOKENS.tolist()])


@pytest.fixture(scope="module", params=CASES, ids=str)
def checkpoint(
    request: pytest.FixtureRequest, hf: Any, lab: Lab, tmp_path_factory: Any
) -> Checkpoint:
    case: Case = request.param
    return Checkpoint(case, random_model(case), lab, tmp_path_factory.mktemp("checkpoint"))


def test_every_two_settings_meet_in_some_case() -> None:
    met = {
        (one, case.point[one], other, case.point[other])
        for case in CASES
        for one, other in combinations(AXES, 2)
    }
    routings = {case.point["routing"]: case.family for case in CASES}
    missing = {
        (one, a, other, b)
        for one, other in combinations(AXES, 2)
        for a in AXES[one]
        for b in AXES[other]
    } - met
    impossible = {
        (one, a, other, b)
        for one, a, other, b in missing
        if routings.get(a) == V2 and FIXED_IN_V2.get(other, b) != b
    }
    assert missing == impossible
    assert len(CASES) >= 24


def test_the_loops_agree_with_transformers(checkpoint: Checkpoint) -> None:
    seen, _ = theirs(in_dtype(checkpoint.model, torch.float64), TOKENS)
    assert_near(checkpoint.reference, seen.logits, FP64)


def test_a_checkpoint_in_fp32_gives_transformers_logits(checkpoint: Checkpoint) -> None:
    model = core.load(checkpoint.run(torch.float32))
    assert_same_model(model, in_dtype(checkpoint.model, torch.float32), TOKENS, FP32)


def test_a_checkpoint_in_fp64_gives_transformers_logits_and_the_loops_own(
    checkpoint: Checkpoint,
) -> None:
    model = core.load(checkpoint.run(torch.float64))
    assert_same_model(model, in_dtype(checkpoint.model, torch.float64), TOKENS, FP64)
    with torch.no_grad():
        assert_near(model.logits(TOKENS), checkpoint.reference, EXACT)


def test_a_checkpoint_comes_back_bit_by_bit(checkpoint: Checkpoint) -> None:
    dtype, back = checkpoint.case.point["dtype"], checkpoint.root / "back"
    result = checkpoint.lab.command("convert", "to-hf", checkpoint.run(dtype), back)
    assert result.code == 0, result.err
    assert_same_bits(read_tensors(back), read_tensors(checkpoint.folder(dtype)))
    assert meaning(back) == meaning(checkpoint.folder(dtype))


def test_affinities_are_spread_out(checkpoint: Checkpoint) -> None:
    """Otherwise the comparison of experts would be one of rounding errors, or of one expert that takes all."""
    seen, routers = theirs(in_dtype(checkpoint.model, torch.float64), random_tokens(4, 40))
    config = checkpoint.model.config.to_dict()
    margins = [
        route(logits, bias, config).margin for logits_TE, bias in routers for logits in logits_TE
    ]
    assert sum(margin < 1e-5 for margin in margins) <= 1
    for experts_TK, (logits_TE, _) in zip(seen.experts, routers, strict=True):
        assert len(experts_TK.unique()) >= 0.6 * logits_TE.shape[1]


@pytest.mark.parametrize("case", [BASE, V2_BASE.but(q_rank=None)], ids=str)
def test_every_tensor_of_a_checkpoint_moves_the_logits(hf: Any, case: Case) -> None:
    """What the comparison of logits can see: another tensor, or another expert, shows a hundred times its tolerance."""
    model, tokens = in_dtype(random_model(case), torch.float64), random_tokens(8, 40)
    expected, _ = theirs(model, tokens)
    fill(model, seed=7)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fill(model, seed=case.seed)
    for name, tensor in model.state_dict().items():
        for part in range(len(tensor)) if ".experts." in name else [slice(None)]:
            kept = tensor[part].clone()
            tensor[part] = other[name][part]
            moved = (
                theirs(model, tokens)[0].logits - expected.logits
            ).abs().max() / expected.logits.abs().max()
            tensor[part] = kept
            assert float(moved) > 100 * FP32, f"{name}, part {part}"
