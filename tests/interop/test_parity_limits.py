"""What one side has and the other lacks: the same logits, or an error that names it, never nearly the right logits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab

import core

from .hf_models import (
    BASE,
    V2_BASE,
    Case,
    in_dtype,
    random_model,
    random_tokens,
    save,
    transformers_or_skip,
)
from .our_runs import random_run
from .parity import FP32, assert_same_model

TOKENS = random_tokens(2, 20, seed=9)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 6,
    "beta_slow": 1,
}
UNUSUAL: list[tuple[Case, Mapping[str, Any], str]] = [
    (BASE, {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
    (V2_BASE, {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
    (BASE, {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "attention_factor"),
    (BASE, {"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
    (BASE, {"rope_parameters": {**YARN, "mscale": 0.0, "mscale_all_dim": 1.0}}, "mscale"),
    (
        BASE,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
        "linear",
    ),
    (
        BASE,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}},
        "dynamic",
    ),
    (BASE, {"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 2}}, "beta_"),
    (BASE, {"rope_parameters": {**YARN, "beta_fast": 1, "beta_slow": 1}}, "beta_"),
    (BASE, {"hidden_act": "gelu"}, "hidden_act"),
    (BASE, {"attention_bias": True}, "attention_bias"),
    (V2_BASE, {"mlp_bias": True}, "mlp_bias"),
    (V2_BASE, {"norm_topk_prob": True}, "norm_topk_prob"),
    (BASE, {"num_experts_per_tok": 1, "topk_group": 1}, "top_k"),
    (V2_BASE.but(routing="v2"), {"n_group": 3, "topk_group": 1}, "n_group"),
]
"""Settings that few checkpoints have, and the word by which the error message must name each."""


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


@pytest.mark.parametrize(("case", "config", "word"), UNUSUAL, ids=lambda value: str(value)[:60])
def test_an_unusual_setting_is_followed_or_refused_by_name(
    hf: Any, lab: Lab, tmp_path: Path, case: Case, config: Mapping[str, Any], word: str
) -> None:
    unusual = replace(case, config=config)
    model = random_model(unusual)
    folder = save(unusual, in_dtype(model, torch.float32), tmp_path / "checkpoint")
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    if result.code == 0:
        assert_same_model(core.load(tmp_path / "run"), in_dtype(model, torch.float32), TOKENS, FP32)
    else:
        assert result.code == 2, result.err
        assert word in result.sentence
        assert not (tmp_path / "run").exists()


FFN = "model.blocks.moe.ffn"
TWO = f"{FFN}.router.group_score=2"
UNKNOWN_THERE = {
    "group_score": [],  # top_k / group_limit = 1 affinity speaks for a group; transformers adds up two
    "affinity": [TWO, f"{FFN}.router.affinity=softmax"],
    "sigmoid": [TWO, f"{FFN}.router.affinity=sqrt_softplus"],
    "hash_gated": [
        f"{FFN}.router={{name: hash_gated, top_k: 2, map: balanced}}",
        f"{FFN}.balance=[]",
    ],
    "swiglu_limit": [TWO, f"{FFN}.swiglu_limit=10"],
    "balance.0.form": [TWO, f"{FFN}.balance.0.form=multiplicative"],
    "switch": [f"{FFN}.router={{name: switch}}", f"{FFN}.balance=[{{name: switch, alpha: 0.01}}]"],
    "dense blocks": [TWO, "model.blocks.last={count: 1, ffn: {name: swiglu, hidden: 48}}"],
    "attention.name": ["model.attention={name: mha, heads: 2}", TWO],
}
"""What can be trained here and not expressed in a config.json, by the word that the error message must contain."""


@pytest.mark.parametrize("word", UNKNOWN_THERE)
def test_what_transformers_cannot_compute_is_not_exported(
    lab: Lab, finished: Path, tmp_path: Path, word: str
) -> None:
    random_run(lab, finished, tmp_path / "run", *UNKNOWN_THERE[word])
    result = lab.command("convert", "to-hf", tmp_path / "run", tmp_path / "exported")
    assert result.code == 2
    assert word in result.sentence
    assert not (tmp_path / "exported").exists()
