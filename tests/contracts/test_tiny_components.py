"""What contracts 2.0 open, each shown by a component that could not exist before: exact, split-invariant, resumable."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import Lab, assert_same_run, last_checkpoint, loads, rows
from tiers import first_by_default
from tiny_components import everything
from torch import Tensor
from torch.nn import functional as F
from two_ranks import on_two_ranks

from core.assemble import build
from core.contracts.build import Rope
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.schedule import Progress
from core.contracts.training import NamedParameter
from core.data.prepare import prepare
from core.generate import check_heads
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.model.parameters import check_groups, named_parameters
from core.model.rope import rotate
from core.testing.clauses import NotApplicable
from core.testing.run import Case, cases
from core.training.totals import WindowTotals, call_on_step_end
from core.training.validation import ValidationTotals
from core.training.window import Window, objective

ALL = everything()
FP64 = "precision.name=fp64"
START = Progress(step=1, tokens=64, total_steps=10, total_tokens=640)


@pytest.mark.full
@pytest.mark.parametrize("case", cases("tiny_components"), ids=lambda case: case.name)
def test_each_keeps_the_contract_of_its_slot(case: Case) -> None:
    try:
        case.run()
    except NotApplicable as why:
        pytest.skip(str(why))


def contexts_of(sizes: list[int], **rest: Any) -> list[SequenceContext]:
    """Eight sequences of unequal padding in micro-batches of these sizes."""
    tokens_BM = torch.randint(1, 270, (8, 13), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([12, 3, 9, 0, 1, 12, 12, 7])
    valid_BL = torch.arange(12)[None] < lengths[:, None]
    found, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        mine = {name: value[part] for name, value in rest.items()}
        found.append(
            SequenceContext.of(
                tokens_BM[part, :-1],
                targets_BL=tokens_BM[part, 1:],
                valid_BL=valid_BL[part],
                first_sequence=start,
                **mine,
            )
        )
        start += size
    return found


def gradients(model: LanguageModel, contexts: list[SequenceContext]) -> dict[str, Tensor]:
    """The gradient of one window's objective."""
    model.zero_grad()
    ledger, progress, totals = Ledger.of(model), START, WindowTotals()
    window = Window.of(model, ledger, contexts)
    for context in contexts:
        objective(model, ledger, model(context), window, progress, totals).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["residual", "attention", "head", "watched", "histogram"])
def test_splitting_and_recomputing_change_no_gradient(lab: Lab, name: str) -> None:
    model = build(lab.recipe(FP64, *ALL[name])).train()
    whole = gradients(model, contexts_of([8]))
    again = build(lab.recipe(FP64, *ALL[name], "recompute.blocks=[dense, moe]")).train()
    for other in (gradients(model, contexts_of([2] * 4)), gradients(again, contexts_of([8]))):
        assert other.keys() == whole.keys()
        for path, value in whole.items():
            torch.testing.assert_close(other[path], value, rtol=1e-9, atol=1e-12, msg=path)
    recomputed = gradients(again, contexts_of([8]))
    assert all(torch.equal(recomputed[path], value) for path, value in whole.items())


@pytest.mark.parametrize("name", first_by_default(sorted(ALL, key="optimizer".__ne__), keep=2))
def test_a_run_trains_validates_and_writes_a_sample(lab: Lab, tmp_path: Path, name: str) -> None:
    summary = lab.fit(tmp_path / "run", *ALL[name], "budget.steps=3")
    assert (summary["steps"], summary["skipped_steps"]) == (3, 0)
    assert summary["val_loss"] > 0
    assert (tmp_path / "run" / "sample.txt").exists()


# ---- tallies and metrics over ranks (over micro-batches and recomputation: tests/training/test_ledger.py)


def test_P22_tallies_loads_and_metrics_are_exact_over_two_ranks(lab: Lab, tmp_path: Path) -> None:
    """Each rank reads four of the eight sequences; both end the step with the integers of one device."""
    recipes = [lab.recipe(FP64, *ALL[name]) for name in ("histogram", "watched")]

    def step(contexts: list[SequenceContext]) -> tuple[Any, ...]:
        counted, watched = (build(recipe).train() for recipe in recipes)
        for model in (counted, watched):
            ledger, totals = Ledger.of(model), WindowTotals()
            window = Window.of(model, ledger, contexts)
            for context in contexts:
                objective(model, ledger, model(context), window, START, totals).backward()
            totals = totals.over_ranks()
            call_on_step_end(model, totals, START)
        ended, _ = watched.blocks[0].attention.ended[0]
        metrics = [float(ended.metrics[name].value()) for name in ("largest", "size")]
        bins = counted.blocks[1].ffn.balancers[0].counted_EN.tolist()
        return bins, totals.loads["blocks.1"].tolist(), ended.tallies["residues"].tolist(), metrics

    alone = step(contexts_of([8]))
    halves = contexts_of([4, 4])
    for rank in on_two_ranks(lambda rank: step([halves[rank]]), tmp_path):
        assert rank[:3] == alone[:3]
        assert rank[3] == pytest.approx(alone[3], rel=1e-12)


# ---- the residual stream of two lanes


def test_two_lanes_are_read_and_written_as_they_say(lab: Lab) -> None:
    """The whole model once more from its parts, lane by lane."""
    model = build(lab.recipe(FP64, *ALL["residual"])).eval()
    (given,) = contexts_of([8])
    lanes = [model.embedding(given.tokens_BL), torch.zeros(8, 12, 32, dtype=torch.float64)]
    for block in model.blocks:
        for norm, layer, part in (
            (block.attention_norm, block.attention, block.attention_residual),
            (block.ffn_norm, block.ffn, block.ffn_residual),
        ):
            given_BLD = norm(lanes[0] * part.mix_2[0] + lanes[1] * part.mix_2[1])
            found = layer(given_BLD, given)
            output_BLD = found[0] if isinstance(found, tuple) else found
            lanes = [
                lane + output_BLD * weight
                for lane, weight in zip(lanes, part.spread_2, strict=True)
            ]
    expected = model.norm(lanes[0] * model.residual.mix_2[0] + lanes[1] * model.residual.mix_2[1])
    torch.testing.assert_close(model.hidden(given)[0], expected, rtol=1e-12, atol=1e-12)
    assert model.heads["mtp"].depths[0].residual.mix_2.shape == (2,), (
        "the multi-token module has the streams too"
    )


# ---- the optimizer of two rates


def test_weights_have_roles_and_kinds(lab: Lab) -> None:
    found = {
        named.name: (named.role, named.kind) for named in named_parameters(build(lab.recipe()))
    }
    assert found["embedding.weight"] == ("embedding", "table")
    assert found["output.weight"] == ("head", "matrix")
    assert found["norm.weight"] == ("norm", "vector")
    assert found["blocks.0.attention.q_up.weight"] == ("attention.q_up", "matrix")
    assert found["blocks.1.ffn.routed.down.weight"] == ("experts.down", "stack")
    assert found["blocks.1.ffn.router.centroids.weight"] == ("router", "matrix")
    assert all(role for role, _ in found.values())


@pytest.mark.full
def test_two_optimizers_step_at_their_own_rates_and_resume_to_the_same_bits(
    lab: Lab, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lab.fit(whole, *ALL["optimizer"])
    states = last_checkpoint(whole)["optimizer_states"]
    rates = [group["lr"] for state in states for group in state["param_groups"]]
    assert rates == [pytest.approx(0.001), pytest.approx(0.01)]
    lab.fit(cut, *ALL["optimizer"])
    for file in sorted((cut / "checkpoints").glob("step-*.ckpt"))[1:]:
        file.unlink()
    (cut / "summary.json").unlink()
    lab.fit(cut, *ALL["optimizer"], resume=True)
    assert_same_run(cut, whole)


class FirstGradients(L.Callback):
    """The gradients when the first optimizer is about to step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.found:
            self.found.update({n: p.grad.clone() for n, p in pl_module.model.named_parameters()})


def test_one_step_of_a_matrix_is_plain_descent_and_of_a_vector_adams(lab: Lab) -> None:
    before: dict[str, Tensor] = {}
    watch = FirstGradients()
    wanted = (FP64, *ALL["optimizer"], "gradient_clip=null", "budget.steps=1")
    model = lab.train(*wanted, model=lambda m: before.update(copied(m)), callbacks=[watch]).model
    for named in named_parameters(model):
        gradient, old = watch.found[named.name], before[named.name]
        if named.kind in ("matrix", "stack"):
            expected = old - 0.01 * 0.1 * gradient
        else:
            expected = old - 0.01 * gradient / (
                gradient.abs() + 1e-8
            )  # Adam's first step, its bias corrected
        torch.testing.assert_close(
            named.parameter.detach(), expected, rtol=1e-10, atol=1e-14, msg=named.name
        )


def copied(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_weight_in_no_group_or_in_two_is_an_error() -> None:
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    named = [NamedParameter("one", one, "", "vector"), NamedParameter("two", two, "", "vector")]
    with pytest.raises(ValueError, match="the weight two in no group"):
        check_groups([torch.optim.SGD([one], lr=0.1)], named)
    with pytest.raises(ValueError, match="the weight one in 2 groups"):
        check_groups([torch.optim.SGD([one, two], lr=0.1), torch.optim.SGD([one], lr=0.1)], named)


# ---- the attention with two ropes


def test_the_second_half_turns_by_the_named_rope(lab: Lab) -> None:
    own, local = (
        build(lab.recipe(FP64, *ALL["attention"], f"model.attention.second={second}")).eval()
        for second in ("null", "local")
    )
    (given,) = contexts_of([8])
    assert own.state_dict().keys() == local.state_dict().keys()
    one, two = own.blocks[0].attention, local.blocks[0].attention
    x_BLHR = torch.randn(
        8, 12, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    turned, second = two._turned(x_BLHR, given), Rope(50.0, two.ropes[1].max_length)
    assert torch.equal(turned[..., :4], one._turned(x_BLHR, given)[..., :4])
    assert torch.equal(
        turned[..., 4:], rotate(x_BLHR[..., 4:].contiguous(), second, given.positions_BL)
    )
    assert not torch.equal(turned[..., 4:], one._turned(x_BLHR, given)[..., 4:])


def test_a_block_that_there_is_not_is_one_sentence(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.heads\.peek reads block 7; there are blocks 0 to 1"
    ):
        lab.fit(tmp_path / "run", *ALL["head"], "model.heads.peek.block=7")
    assert not (tmp_path / "run").exists()


def test_an_unknown_rope_is_one_sentence_before_work_starts(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.ropes has no 'locl'; did you mean local\?"):
        lab.fit(tmp_path / "run", *ALL["attention"], "model.attention.second=locl")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_cache_that_cannot_be_truncated_says_so_and_decodes(lab: Lab) -> None:
    model = build(lab.recipe(FP64, *ALL["attention"])).eval()
    tokens_BL = contexts_of([8])[0].tokens_BL
    caches = model.new_caches(8, 12)
    with torch.no_grad():
        parts = [model.decode(part, caches) for part in tokens_BL.split([5, 1, 6], dim=1)]
        torch.testing.assert_close(
            torch.cat(parts, dim=1), model.logits(tokens_BL), rtol=1e-10, atol=1e-12
        )
    with pytest.raises(NotImplementedError, match="ClosedCache cannot be truncated"):
        caches[0].truncate(torch.tensor([1] * 8))


def test_a_role_of_its_own_can_be_named_and_is_listed(lab: Lab) -> None:
    high = "precision={name: fp8_emulated, high: [embedding, head, router, norm, mtp.projection, tiny.mixed]}"
    recipe = lab.recipe(*ALL["attention"], high)
    assert recipe.precision.config.stays_high("tiny.mixed")
    from core.describe import document_of

    assert document_of(recipe)["precision"]["tiny.mixed"]["computed"] == "float32"
    assert document_of(lab.recipe(*ALL["attention"], "precision.name=fp8_emulated"))["precision"][
        "tiny.mixed"
    ]["computed"].startswith("float8")
    with pytest.raises(UserError, match="is not a role"):
        lab.recipe(
            "precision={name: fp8_emulated, high: [embedding, head, router, norm, tiny.mixed]}"
        )


# ---- rows of different lengths


def test_rows_of_different_lengths_decode_as_each_row_alone(lab: Lab) -> None:
    model = build(lab.recipe(FP64)).eval()
    tokens_BL, lengths = contexts_of([8])[0].tokens_BL, [1, 3, 12, 5, 7, 2, 9, 12]
    caches = model.new_caches(8, 16)
    with torch.no_grad():
        model.decode(tokens_BL, caches)
        for cache in caches:
            cache.truncate(torch.tensor(lengths))
        more_BL = tokens_BL.flip(1)[:, :4]
        logits_BLV = torch.cat(
            [model.decode(more_BL[:, i : i + 1], caches) for i in range(4)], dim=1
        )
        for row, length in enumerate(lengths):
            whole = torch.cat([tokens_BL[row, :length], more_BL[row]])[None]
            expected = model.logits(whole)[0, length:]
            torch.testing.assert_close(logits_BLV[row], expected, rtol=1e-10, atol=1e-10)
    assert caches[0].lengths.tolist() == [length + 4 for length in lengths]


# ---- the head that reads a block's state


def test_drafting_from_a_blocks_state_is_refused_before_weights_are_read(lab: Lab) -> None:
    recipe = lab.recipe(*ALL["head"], "model.heads.mtp=null")
    with pytest.raises(
        UserError, match=r"--speculative: model\.heads\.peek drafts from states of single blocks"
    ):
        check_heads(recipe)


def test_the_head_reads_the_state_after_the_block_and_drafts_what_it_learned(lab: Lab) -> None:
    model = build(lab.recipe(FP64, *ALL["head"])).eval()
    (given,) = contexts_of([8])
    states = model.states(given, blocks=[1])
    head = model.heads["peek"]
    x_BLD = model.embedding(given.tokens_BL)
    for block in list(model.blocks)[:2]:
        x_BLD = block(x_BLD, given)[0]
    assert torch.equal(states.after_blocks[1], x_BLD)
    joined = head.joined(torch.cat([x_BLD, model.embedding(given.tokens_BL)], dim=-1))
    losses_BL = F.cross_entropy(
        model.output(joined).transpose(1, 2), given.targets_BL, reduction="none"
    )
    expected = (losses_BL * given.predicted()).sum()
    torch.testing.assert_close(
        model(given).heads["peek"].terms["peek"], expected, rtol=1e-12, atol=0
    )
    shared = model.shared(head, states)
    assert shared.stream is not None
    drafted = head.draft(states.hidden_BLD, given, shared, head.new_draft_caches(8, 12))
    torch.testing.assert_close(drafted.logits_BLV, model.output(joined), rtol=1e-12, atol=1e-12)
    assert model.shared(model.heads["mtp"], states).states == {}, (
        "a head sees what it reads, and nothing else"
    )
    with pytest.raises(NotImplementedError, match="does not draft"):
        model.heads["next_token"].draft(states.hidden_BLD, given, shared, [])


# ---- targets that are not learned


def test_what_is_not_learned_has_no_loss_and_still_takes_load(lab: Lab) -> None:
    model = build(lab.recipe(FP64)).train()
    learned_BM = torch.rand(8, 13, generator=torch.Generator().manual_seed(5)) < 0.4
    (plain,), (masked,) = contexts_of([8]), contexts_of([8], learned_BM=learned_BM)
    one, two = model(plain), model(masked)
    for path, record in one.expert_records().items():
        assert torch.equal(record.load_E, two.expert_records()[path].load_E), path
    counted = sum(
        int(learned_BM[b, i + 1]) for b in range(8) for i in range(12) if bool(plain.valid()[b, i])
    )
    ledger = Ledger.of(model)
    window = Window.of(model, ledger, [masked])
    counts = {term.label: int(window.counts[term]) for term in ledger.heads}
    assert counts == {"next_token": counted, "mtp/depth_1": counted}
    logits_BLV = model.logits(plain.tokens_BL)
    losses_BL = F.cross_entropy(logits_BLV.transpose(1, 2), plain.targets_BL, reduction="none")
    expected = (losses_BL * (plain.valid() & learned_BM[:, 1:])).sum()
    torch.testing.assert_close(
        two.heads["next_token"].terms["next_token"], expected, rtol=1e-10, atol=0
    )
    split = contexts_of([2] * 4, learned_BM=learned_BM)
    whole, parts = gradients(model, [masked]), gradients(model, split)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12, msg=name)


# ---- the corpus of token blocks


def test_blocks_become_a_stream_with_masks_and_sources(lab: Lab) -> None:
    corpus = lab.recipe(*ALL["corpus"]).data.corpus
    made = corpus.component(corpus.config)
    prepared = prepare(made, 270)
    blocks = list(made.blocks("train"))
    assert prepared.train.tokens.tolist() == [token for block in blocks for token in block.tokens]
    assert prepared.train.learned.tolist() == [flag for block in blocks for flag in block.learned]
    assert prepared.train.sources.tolist() == [index % 2 for index in range(40)]
    assert prepared.train.bytes == sum(block.text_bytes for block in blocks)
    assert prepared.validation.documents == 4
    assert prepare(made, 270).fingerprint == prepared.fingerprint
    fewer = corpus.component(type(corpus.config)(count=39))
    assert prepare(fewer, 270).fingerprint != prepared.fingerprint


def test_a_run_on_token_blocks_learns_answers_only_and_counts_every_token(
    lab: Lab, tmp_path: Path
) -> None:
    lab.fit(tmp_path / "run", *ALL["corpus"], "budget.steps=3")
    found = loads(tmp_path / "run")
    assert found["load.blocks.1"].sum(dim=1).tolist() == [4 * 2 * 16 * 2] * 3, (
        "tokens x top-k, learned or not"
    )
    result = lab.command("evaluate", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert any("val_loss" in row for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("sizes", [[8], [5, 3]])
def test_a_head_reports_its_loss_for_each_source(lab: Lab, sizes: list[int]) -> None:
    """Against a loop over sequences, over a validation read in one batch or two."""
    recipe = lab.recipe(
        FP64, "plugins=[tiny_components]", "model.heads={next_token: {name: by_source, sources: 2}}"
    )
    model = build(recipe)
    source_B = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    validation = ValidationTotals(model, Ledger.of(model), 100)
    sums = [0.0, 0.0]
    counts = [0, 0]
    with torch.no_grad():
        for context in contexts_of(sizes, source_B=source_B):
            validation.update(model(context), context)
        (whole,) = contexts_of([8], source_B=source_B)
        logits_BLV = model.output(model.hidden(whole)[0])
    for row, source in enumerate(source_B.tolist()):
        for place in range(12):
            if whole.predicted()[row, place]:
                target = int(whole.targets_BL[row, place])  # type: ignore[index]
                sums[source] -= float(logits_BLV[row, place].log_softmax(-1)[target])
                counts[source] += 1
    values = validation.compute()
    assert all(counts)
    for source in (0, 1):
        found = values[f"val/next_token/source_{source}"]
        assert found == pytest.approx(sums[source] / counts[source], rel=1e-10)


def test_the_loader_hands_masks_and_sources_to_the_model(lab: Lab) -> None:
    from core.analysis.budget import plan_of
    from core.assemble import make
    from core.run.data import text_data

    recipe = lab.recipe(*ALL["corpus"], "budget.steps=2")
    data = text_data(recipe, plan_of(recipe))
    data.prepare()
    store = prepare(make(recipe.data.corpus), 270).train
    (batch, *_) = data.train_dataloader().window(0)
    flat, masks = store.tokens.tolist(), store.learned.tolist()
    for row in range(len(batch.tokens_BL)):
        tokens = [*batch.tokens_BL[row].tolist(), int(batch.targets_BL[row, -1])]
        begin = next(i for i in range(0, len(flat) - 16, 16) if flat[i : i + 17] == tokens)
        assert batch.learned_BM[row].tolist() == masks[begin : begin + 17]
        document = sum(start <= begin for start in store.starts.tolist()) - 1
        assert int(batch.source_B[row]) == store.sources[document]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "data.tokenizer.vocab=300",
            "data.tokenizer.vocab = 300: the vocabulary of this corpus has 270 entries",
        ),
        (
            "data.corpus.bad_id=270",
            "train block 39 holds the id 270, which is not in a vocabulary of 270",
        ),
        ("data.corpus.count=0", "it has no block to train on"),
    ],
)
def test_a_corpus_that_cannot_be_right_is_one_sentence(
    lab: Lab, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        lab.fit(tmp_path / "run", *ALL["corpus"], override)


def test_an_optimizer_that_needs_whole_matrices_is_an_error_of_the_recipe(lab: Lab) -> None:
    sentence = r"strategy\.name = 'fsdp': .* optimizer by_kind needs whole matrices"
    with pytest.raises(UserError, match=sentence):
        lab.recipe(
            "strategy={name: fsdp, ranks: 2}",
            "plugins=[tiny_components]",
            "optimizer={name: by_kind, lr: 0.01}",
        )
