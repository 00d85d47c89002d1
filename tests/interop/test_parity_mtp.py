"""Multi-token layers in released checkpoints: three witnesses for their logits, and the copies that they carry.

The loops take report eq. 21-23 with the released order of the two halves; transformers' `MtpModel` is made for layer
61, so the test sets where the layers are. Greedy text would prove nothing: drafts only change how fast it comes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from torch import Tensor

import core
from core.contracts.context import SequenceContext

from .hf_models import (
    BASE,
    LAYERS,
    Case,
    change_config,
    in_dtype,
    meaning,
    mtp_tensors,
    random_model,
    random_tokens,
    read_config,
    read_tensors,
    save,
    shared_copies,
    transformers_or_skip,
    write_tensors,
)
from .hf_reference import HFReference
from .parity import EXACT, FP64, assert_near, assert_same_bits

TOKENS = random_tokens(2, 20, seed=3)
CASES = [
    (BASE.but(dtype=torch.float64, style="released"), 1),
    (BASE.but(dtype=torch.float64, tied=True, yarn="different", q_rank=None, layout="packed"), 1),
    (
        BASE.but(
            dtype=torch.float64, interleave=False, routing="v3", yarn="none", widths="values_wide"
        ),
        2,
    ),
]


@pytest.fixture(scope="module")
def hf() -> Any:
    return transformers_or_skip()


@dataclass(frozen=True)
class WithDepths:
    """A checkpoint with multi-token layers and the run that was made of it."""

    folder: Path
    run: Path
    depths: int


def with_depths(case: Case, depths: int, root: Path) -> Path:
    """A checkpoint as it is released: each multi-token layer with its copies of embedding and output."""
    folder = save(case, in_dtype(random_model(case), case.point["dtype"]), root / "checkpoint")
    tensors = {**read_tensors(folder), **mtp_tensors(case, depths, root / "scratch")}
    write_tensors(folder, {**tensors, **shared_copies(tensors, depths)}, files=3)
    change_config(folder, num_nextn_predict_layers=depths)
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}-depth{p[1]}")
def opened(request: pytest.FixtureRequest, hf: Any, lab: Lab, tmp_path_factory: Any) -> WithDepths:
    (case, depths), root = request.param, tmp_path_factory.mktemp("mtp")
    folder = with_depths(case, depths, root)
    result = lab.command("convert", "from-hf", folder, root / "run")
    assert result.code == 0, result.err
    return WithDepths(folder, root / "run", depths)


def loops(opened: WithDepths) -> list[Tensor]:
    reference = HFReference(read_config(opened.folder), read_tensors(opened.folder))
    rows = [reference.depth_logits(tokens, opened.depths) for tokens in TOKENS.tolist()]
    return [torch.stack(depth) for depth in zip(*rows, strict=True)]


@torch.no_grad()
def ours(run: Path) -> list[Tensor]:
    """Logits B x (L - k) x V of every depth k: what its head hands to the shared output."""
    model = core.load(run)
    states: list[Tensor] = []
    head = model.get_submodule("heads.mtp")
    for depth in head.get_submodule("depths").children():
        depth.register_forward_hook(lambda _, __, output: states.append(output[0]))
    context = SequenceContext.of(TOKENS, targets_BL=torch.zeros_like(TOKENS))
    hidden_BLD, _ = model.hidden(context)
    head(hidden_BLD, context, model.shared())
    return [model.output(state) for state in states]


@torch.no_grad()
def transformers_own(hf: Any, folder: Path, depths: int) -> list[Tensor]:
    """The same from `MtpModel`, which `generate(use_mtp=True)` drafts with, fed with the true tokens."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    own = hf.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3PreTrainedModel
    layers = [rf"model\.layers\.{LAYERS + k}\..*" for k in range(depths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_keys_to_ignore_on_load_unexpected", layers)
        main = hf.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float64)
        main.set_experts_implementation("eager")
        mtp = MtpModel.from_pretrained(main)
    mtp.set_experts_implementation("eager")
    cache, found = MtpCache(config=main.config.get_mtp_config()), []
    state = main.model(TOKENS).last_hidden_state
    for k in range(1, depths + 1):
        tokens, positions = TOKENS[:, k:], torch.arange(k, TOKENS.shape[1])[None]
        state = mtp.forward_layer(k - 1, state[:, :-1], positions, cache, input_ids=tokens)
        found.append(mtp.shared_head(state))
    return found


def test_the_loops_agree_with_transformers(hf: Any, opened: WithDepths) -> None:
    for expected, found in zip(
        transformers_own(hf, opened.folder, opened.depths), loops(opened), strict=True
    ):
        assert_near(found, expected, FP64)


def test_every_depth_gives_the_loops_logits(opened: WithDepths) -> None:
    for found, expected in zip(ours(opened.run), loops(opened), strict=True):
        assert_near(found, expected, EXACT)


def test_every_depth_gives_transformers_logits(hf: Any, opened: WithDepths) -> None:
    for found, expected in zip(
        ours(opened.run), transformers_own(hf, opened.folder, opened.depths), strict=True
    ):
        assert_near(found, expected, FP64)


def test_the_way_back_has_the_same_bits_and_the_copies_too(
    opened: WithDepths, lab: Lab, tmp_path: Path
) -> None:
    result = lab.command("convert", "to-hf", opened.run, tmp_path / "back")
    assert result.code == 0, result.err
    back = read_tensors(tmp_path / "back")
    assert_same_bits(back, read_tensors(opened.folder))
    assert meaning(tmp_path / "back") == meaning(opened.folder)
    assert read_config(tmp_path / "back")["num_nextn_predict_layers"] == opened.depths


@pytest.mark.parametrize("part", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_is_refused_by_name(
    hf: Any, lab: Lab, tmp_path: Path, part: str
) -> None:
    folder = with_depths(BASE, 1, tmp_path)
    tensors, name = read_tensors(folder), f"model.layers.{LAYERS}.{part}"
    tensors[name] = tensors[name].clone()
    tensors[name][5, 2] += 1e-6
    write_tensors(folder, tensors)
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    assert result.code == 2
    assert name in result.sentence
    assert not (tmp_path / "run").exists()


def test_copies_may_be_left_out(hf: Any, lab: Lab, tmp_path: Path) -> None:
    folder = with_depths(BASE.but(dtype=torch.float64), 1, tmp_path)
    copies = shared_copies(read_tensors(folder), 1)
    write_tensors(
        folder, {name: t for name, t in read_tensors(folder).items() if name not in copies}
    )
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    assert result.code == 0, result.err
    (expected,), (found,) = loops(WithDepths(folder, tmp_path / "run", 1)), ours(tmp_path / "run")
    assert_near(found, expected, EXACT)


@pytest.mark.parametrize(
    "part", ["eh_proj.weight", "mlp.gate.weight", "mlp.experts.3.up_proj.weight"]
)
def test_a_multi_token_layer_without_one_of_its_tensors_is_refused_by_name(
    hf: Any, lab: Lab, tmp_path: Path, part: str
) -> None:
    folder = with_depths(BASE, 1, tmp_path)
    tensors, name = read_tensors(folder), f"model.layers.{LAYERS}.{part}"
    del tensors[name]
    write_tensors(folder, tensors)
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    assert result.code == 2
    assert name in result.sentence
    assert not (tmp_path / "run").exists()


def test_a_multi_token_layer_that_the_configuration_does_not_report_is_refused(
    hf: Any, lab: Lab, tmp_path: Path
) -> None:
    folder = with_depths(BASE, 1, tmp_path)
    change_config(folder, num_nextn_predict_layers=0)
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    assert result.code == 2
    assert "num_nextn_predict_layers = 0: " in result.sentence
    assert f"layers that are not counted ({LAYERS})" in result.sentence


def test_a_promised_layer_without_weights_means_no_head_and_one_line(
    hf: Any, lab: Lab, tmp_path: Path
) -> None:
    """transformers itself writes num_nextn_predict_layers = 1 with no such weights."""
    folder = save(BASE, in_dtype(random_model(BASE), torch.float32), tmp_path / "checkpoint")
    assert read_config(folder)["num_nextn_predict_layers"] == 1
    result = lab.command("convert", "from-hf", folder, tmp_path / "run")
    assert result.code == 0, result.err
    lines = [
        line
        for line in (result.out + result.err).splitlines()
        if "num_nextn_predict_layers" in line
    ]
    assert len(lines) == 1
    assert not any(
        name.startswith("heads.mtp") for name, _ in core.load(tmp_path / "run").named_parameters()
    )
