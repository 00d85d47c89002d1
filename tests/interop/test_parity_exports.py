"""Recipes of ours as checkpoints of Hugging Face: the same logits under transformers, the same drafts in the loops.

The runs have the files of a trained one and weights that are all drawn at random, norms and biases included, because
weights near their initial values hide what is in the wrong place.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab

import core
from core.contracts.context import SequenceContext

from .hf_models import read_config, read_tensors, transformers_or_skip
from .hf_reference import HFReference
from .our_runs import random_run
from .parity import FP32, assert_near, assert_same_model

FFN, ROUTER = "model.blocks.moe.ffn", "model.blocks.moe.ffn.router"
TWO, PLAIN = f"{ROUTER}.group_score=2", "model.heads.mtp=null"
YARN = (
    "model.rope={{max_length: 128, yarn: {{factor: 4, original_length: 32, beta_fast: 6, mscale: {}, "
    "mscale_all_dim: {}}}}}"
)
V2 = [PLAIN, f"{FFN}.balance=[{{name: expert}}]", f"{FFN}.shared_experts=2"]
RECIPES: dict[str, list[str]] = {
    "as it is": [TWO],
    "yarn equal, more depths": [TWO, YARN.format(0.7, 0.7), "model.heads.mtp.depth=2"],
    "yarn different, queries straight": [TWO, YARN.format(0.7, 1.3), "model.attention.q_rank=null"],
    "yarn mscale alone, tied": [TWO, YARN.format(0.7, "null"), "model.tied_embedding=true"],
    "yarn all_dim alone, no shared expert": [
        TWO,
        YARN.format("null", 0.8),
        f"{FFN}.shared_experts=0",
    ],
    "yarn without either, no dense layer": [
        TWO,
        YARN.format("null", "null"),
        "model.blocks.dense.count=0",
    ],
    "no groups, gates as they are": [
        f"{ROUTER}={{name: deepseek_v3, groups: 1, group_limit: null, top_k: 3, scale: 1.5, normalise: false}}",
        f"{FFN}.shared_experts=2",
        PLAIN,
    ],
    "epsilons": [TWO, "model.norm_eps=0.01", "model.attention.norm_eps=0.000001"],
    "no bias": [TWO, f"{FFN}.balance=[{{name: sequence, alpha: 0.01}}]"],
    "theta": [TWO, "model.rope.theta=500"],
    "no experts": ["model.blocks.moe.count=0", "model.blocks.dense.count=2", PLAIN],
    "v2": [f"{ROUTER}={{name: deepseek_v2, groups: 1, group_limit: null, top_k: 3}}", *V2],
    "v2 with groups": [
        f"{ROUTER}={{name: deepseek_v2, top_k: 2, groups: 4, group_limit: 2, scale: 16}}",
        *V2,
    ],
}
TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


def draft_logits(model: Any) -> list[torch.Tensor]:
    """What each multi-token module predicts; none without such a head."""
    states: list[torch.Tensor] = []
    head = dict(model.loss_heads()).get("mtp")
    if head is None:
        return []
    for depth in head.depths:
        depth.register_forward_hook(lambda _, __, output: states.append(output[0]))
    context = SequenceContext.of(TOKENS, targets_BL=torch.zeros_like(TOKENS))
    head(model.hidden(context)[0], context, model.shared())
    return [model.output(state) for state in states]


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors"
)  # transformers without a shared expert
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_ours_gives_the_same_logits_under_transformers(
    hf: Any, lab: Lab, finished: Path, tmp_path: Path, name: str
) -> None:
    random_run(lab, finished, tmp_path / "run", *RECIPES[name])
    result = lab.command(
        "convert", "to-hf", tmp_path / "run", tmp_path / "exported", "--dtype", "fp32"
    )
    assert result.code == 0, result.err
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    layers = loaded.config.num_hidden_layers
    assert all(
        int(key.split(".")[2]) >= layers for key in info["unexpected_keys"]
    )  # multi-token layers alone
    ours = core.load(tmp_path / "run")
    assert_same_model(ours, loaded.eval(), TOKENS, FP32)
    found = draft_logits(ours)
    config = read_config(tmp_path / "exported")
    assert config.get("num_nextn_predict_layers", 0) == len(found)
    loops = HFReference({**loaded.config.to_dict(), **config}, read_tensors(tmp_path / "exported"))
    expected = [loops.depth_logits(tokens, len(found)) for tokens in TOKENS.tolist()]
    for k, depth in enumerate(found):
        assert_near(depth, torch.stack([row[k] for row in expected]), FP32)
