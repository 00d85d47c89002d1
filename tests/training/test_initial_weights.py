"""A part of another run's weights: new modules, more experts, a longer vocabulary; nothing happens unasked."""

import json
from pathlib import Path

import pytest
import torch
from lab import Lab
from rank_runs import assert_same_end, fit_on_ranks
from tiers import first_by_default
from torch import Tensor

import core
from core.assemble import build
from core.checkpoints.listing import checkpoints_in
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel
from core.recipe.selection import Selection
from core.run.initial_weights import initial_weights

FP64 = "precision.name=fp64"
ONLY_MAIN = "model.heads.mtp=null"
DENSE = (
    FP64,
    ONLY_MAIN,
    "model.blocks={dense: {count: 2, ffn: {name: swiglu, hidden: 48}}, moe: null}",
    "budget.steps=2",
)
"""Two dense layers, briefly trained so that nothing in them is special."""

TOKENS_BL = torch.arange(48).view(3, 16) * 7 % 300


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def dense(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dense"
    lab.fit(run, *DENSE)
    return run


@pytest.fixture(scope="module")
def moe(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "moe"
    lab.fit(run, FP64, ONLY_MAIN, "budget.steps=2", *routing(2))
    return run


def routing(top_k: int) -> tuple[str, ...]:
    """Overrides of the small recipe's router: a number of choices, and no groups."""
    router = f"{{name: deepseek_v3, top_k: {top_k}, scale: 2.5, groups: 1, group_limit: null}}"
    return (f"model.blocks.moe.ffn.router={router}",)


def experts(count: int, hidden: int, top_k: int, shared: int = 0, router: str = "") -> str:
    """The override that gives both layers experts."""
    chooser = (
        router or f"{{name: deepseek_v3, top_k: {top_k}, scale: 2.5, groups: 1, group_limit: null}}"
    )
    ffn = (
        f"{{name: moe, experts: {count}, expert_hidden: {hidden}, shared_experts: {shared}, "
        f"router: {chooser}, balance: [{{name: bias, rate: 0.01}}]}}"
    )
    return f"model.blocks={{dense: null, moe: {{count: 2, ffn: {ffn}}}}}"


def started(lab: Lab, source: Path, selection: Selection, *overrides: str) -> LanguageModel:
    """A model with the weights that a run with these settings would start from."""
    model = build(lab.recipe(FP64, ONLY_MAIN, *overrides))
    checkpoint = checkpoints_in(source)[-1]
    initial_weights(model, checkpoint, selection, trust=False).load(model)
    return model.eval()


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        hidden, _ = model.hidden(SequenceContext.of(TOKENS_BL))
        return model.output(hidden)


def assert_same_output(model: LanguageModel, source: Path) -> None:
    torch.testing.assert_close(logits(model), logits(core.load(source)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("how", "count", "hidden", "top_k", "shared"),
    first_by_default(
        [
            ("copy", 4, 48, 2, 0),
            ("split", 8, 12, 4, 0),
            ("split", 6, 16, 4, 1),
            ("split", 4, 24, 2, 1),
        ],
        keep=2,
        several=True,
    ),
)
def test_an_upcycled_model_begins_with_the_dense_models_output(
    lab: Lab, dense: Path, how: str, count: int, hidden: int, top_k: int, shared: int
) -> None:
    """Gates add up to 2.5, so down-projections are multiplied by parts / 2.5; parts are 1, 4, 2 and 1."""
    selection = Selection(path=str(dense), experts=how)  # type: ignore[arg-type]
    model = started(lab, dense, selection, experts(count, hidden, top_k, shared))
    assert_same_output(model, dense)


@pytest.mark.full
def test_parts_and_copies_are_where_the_documents_say(lab: Lab, dense: Path) -> None:
    """Builds the experts of `split` one by one: part j of copy c is expert c g + j."""
    selection = Selection(path=str(dense), experts="split")
    state = started(lab, dense, selection, experts(8, 12, 4)).state_dict()
    old = core.load(dense).state_dict()
    gate_up = old["blocks.0.ffn.gate_up.weight"]
    down = old["blocks.0.ffn.down.weight"]
    for copy in range(2):
        for part in range(4):
            expert = copy * 4 + part
            units = [part * 12 + unit for unit in range(12)]
            rows = units + [48 + unit for unit in units]
            made = state["blocks.0.ffn.routed.gate_up.weight"][expert]
            assert torch.equal(made, gate_up[rows])
            made = state["blocks.0.ffn.routed.down.weight"][expert]
            torch.testing.assert_close(made, down[:, units] * (4 / 2.5))
            row = state["blocks.0.ffn.router.centroids.weight"]
            assert torch.equal(row[expert], row[copy * 4])
    assert not torch.equal(row[0], row[4])


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "count", "hidden", "top_k"),
    first_by_default([("copy", 16, 16, 4), ("split", 16, 8, 4), ("split", 32, 8, 8)], several=True),
)
def test_more_experts_begin_with_the_output_of_fewer(
    lab: Lab, moe: Path, how: str, count: int, hidden: int, top_k: int
) -> None:
    selection = Selection(path=str(moe), experts=how)  # type: ignore[arg-type]
    sizes = (
        f"model.blocks.moe.ffn.experts={count}",
        f"model.blocks.moe.ffn.expert_hidden={hidden}",
        f"model.blocks.moe.ffn.shared_experts={16 // hidden}",
    )
    model = started(lab, moe, selection, *routing(top_k), *sizes)
    assert_same_output(model, moe)
    state = model.state_dict()
    bias = core.load(moe).state_dict()["blocks.1.ffn.balance.0.bias"]
    assert torch.equal(state["blocks.1.ffn.balance.0.bias"], bias.repeat_interleave(count // 8))


@pytest.mark.full
def test_noise_tells_copies_apart_and_keeps_the_first(lab: Lab, moe: Path) -> None:
    selection = Selection(path=str(moe), experts="copy", noise=0.5)
    state = started(
        lab, moe, selection, *routing(4), "model.blocks.moe.ffn.experts=16"
    ).state_dict()
    name = "blocks.1.ffn.router.centroids.weight"
    rows = state[name]
    drawn = build(lab.recipe(FP64, *routing(4), "model.blocks.moe.ffn.experts=16")).state_dict()[
        name
    ]
    old = core.load(moe).state_dict()[name]
    assert torch.equal(rows[::2], old)
    torch.testing.assert_close(rows[1::2], old + 0.5 * drawn[1::2])


@pytest.mark.parametrize("how", first_by_default(["draw", "mean"]))
def test_a_longer_vocabulary_keeps_its_rows(lab: Lab, dense: Path, how: str) -> None:
    longer = "data.tokenizer.vocab=310"
    selection = Selection(path=str(dense), vocabulary=how)  # type: ignore[arg-type]
    model = started(lab, dense, selection, *DENSE[2:], longer)
    state = model.state_dict()
    old = core.load(dense).state_dict()
    drawn = build(lab.recipe(FP64, ONLY_MAIN, *DENSE[2:], longer)).state_dict()
    for name in ("embedding.weight", "output.weight"):
        assert torch.equal(state[name][:300], old[name])
        new = drawn[name][300:] if how == "draw" else old[name].mean(dim=0).expand(10, -1)
        torch.testing.assert_close(state[name][300:], new)
    torch.testing.assert_close(logits(model)[..., :300], logits(core.load(dense)))


def test_a_new_module_is_drawn_and_a_row_of_the_summary_says_so(
    lab: Lab, dense: Path, tmp_path: Path
) -> None:
    new = (*DENSE[:1], *DENSE[2:], "budget.steps=1", "optimizer.lr=0")
    weights = f"initial_weights={{path: {dense}, exclude: [heads.mtp]}}"
    summary = lab.fit(tmp_path / "run", *new, weights)
    state = core.load(tmp_path / "run").state_dict()
    old = core.load(dense).state_dict()
    drawn = build(lab.recipe(*new)).state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, drawn[name] if name.startswith("heads.mtp") else old[name]), name
    assert any("heads.mtp" in notice and "are drawn" in notice for notice in summary["notices"])
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())["initial_weights"]
    assert record["drawn"] == sorted(name for name in state if name.startswith("heads.mtp"))
    assert record["taken"] == len(old)
    assert record["checkpoint"] == str(checkpoints_in(dense)[-1])
    again = lab.fit(tmp_path / "run", *new, weights, resume=True)
    assert again["notices"] == summary["notices"]


@pytest.mark.full
def test_what_only_the_source_has_is_left_out_where_asked(
    lab: Lab, moe: Path, tmp_path: Path
) -> None:
    """Takes the embedding and the output of a model with other layers."""
    selection = Selection(path=str(moe), include=["embedding", ".output"])
    model = build(lab.recipe(*DENSE))
    found = initial_weights(model, checkpoints_in(moe)[-1], selection, trust=False)
    found.load(model)
    state = model.state_dict()
    old = core.load(moe).state_dict()
    assert found.taken == 2
    assert set(found.left_out) == set(old) - {"embedding.weight", "output.weight"}
    assert set(found.drawn) == set(state) - {"embedding.weight", "output.weight"}
    for name in ("embedding.weight", "output.weight"):
        assert torch.equal(state[name], old[name])


WRONG = {
    "a missing tensor": (
        {},
        ("model.heads.mtp={name: mtp, depth: 1}",),
        r"tensor heads\.mtp\..* is missing; initial_weights\.exclude: \[heads\.mtp\..*\] leaves it as it is drawn",
    ),
    "a pattern of nothing": (
        {"exclude": ["heads.mpt"]},
        ("model.heads.mtp={name: mtp, depth: 1}",),
        r"initial_weights\.exclude: 'heads\.mpt' chooses no tensor; did you mean heads\.mtp",
    ),
    "a longer vocabulary": (
        {},
        ("data.tokenizer.vocab=310",),
        r"embedding\.weight is \(300, 32\), the model's \(310, 32\); initial_weights\.vocabulary",
    ),
    "a shorter vocabulary": (
        {"vocabulary": "mean"},
        ("data.tokenizer.vocab=290",),
        "rows can only be added",
    ),
    "no longer vocabulary": ({"vocabulary": "mean"}, (), "the model has as many tokens as"),
    "experts unasked": (
        {},
        (experts(4, 48, 2),),
        r"tensor blocks\.0\.ffn\.router\.centroids\.weight is missing",
    ),
    "no experts": ({"experts": "copy"}, (), "no layer of the model has other routed experts"),
    "another width": (
        {"experts": "copy"},
        (experts(4, 24, 2),),
        r"blocks\.0\.ffn: expert_hidden is 24, and must be 48 as in the source",
    ),
    "no divisor": (
        {"experts": "split"},
        (experts(4, 20, 2),),
        r"expert_hidden is 20, and must divide the source's width 48",
    ),
    "no multiple": (
        {"experts": "split"},
        (experts(6, 12, 4),),
        r"there are 6 experts, and their number must be a multiple of 4",
    ),
    "gates of any sum": (
        {"experts": "copy"},
        (
            experts(4, 48, 2, router="{name: deepseek_v2, top_k: 2, scale: 1.0}"),
            "model.blocks.moe.ffn.balance=[]",
        ),
        r"initial_weights\.scale = null: must be given, because the gates",
    ),
}


@pytest.mark.parametrize("case", first_by_default(WRONG, keep=4))
def test_what_nobody_asked_for_is_refused_by_name(lab: Lab, dense: Path, case: str) -> None:
    keys, overrides, sentence = WRONG[case]
    base = DENSE[:1] if any("mtp" in o for o in overrides) else DENSE[:2]
    blocks = () if any(o.startswith("model.blocks=") for o in overrides) else DENSE[2:]
    model = build(lab.recipe(*base, *blocks, *overrides), device="meta")
    selection = Selection(path=str(dense), **keys)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=sentence):
        initial_weights(model, checkpoints_in(dense)[-1], selection, trust=False)


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy",
    [
        "strategy={name: ddp, ranks: 2}",
        "strategy={name: fsdp, ranks: 2}",
        "strategy={name: expert_parallel, expert_ranks: 2}",
    ],
    ids=["ddp", "fsdp", "expert_parallel"],
)
@pytest.mark.parametrize("base", ["dense", "moe"])
def test_ranks_make_the_same_experts_rows_and_noise(
    lab: Lab, dense: Path, moe: Path, tmp_path: Path, strategy: str, base: str
) -> None:
    keys = ["experts: split", "vocabulary: draw", f"path: {dense}"]
    made: tuple[str, ...] = (experts(8, 12, 4),)
    if base == "moe":
        keys = ["experts: copy", "noise: 0.5", "vocabulary: draw", f"path: {moe}"]
        made = (*routing(4), "model.blocks.moe.ffn.experts=16")
    start = (
        FP64,
        ONLY_MAIN,
        *made,
        f"initial_weights={{{', '.join(keys)}}}",
        "data.tokenizer.vocab=310",
        "budget.steps=1",
    )
    lab.fit(tmp_path / "one", *start)
    fit_on_ranks(lab, tmp_path / "two", *start, strategy)
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_a_pattern_without_a_tensor_is_found_before_the_text_is_read(
    lab: Lab, tmp_path: Path, moe: Path
) -> None:
    chosen = f"initial_weights={{path: {moe}, include: [xx]}}"
    result = lab.command("fit", lab.file, chosen, "--out", tmp_path / "run")
    assert result.code == 2
    assert "initial_weights.include: 'xx' chooses no tensor" in result.err
    assert "text:" not in result.out + result.err
