"""Sweep files: what is shipped can be run, and errors are found before the first run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lab import ROOT, Lab

from core.contracts.errors import UserError
from core.recipe.shipped import shipped_sweeps
from core.study.matching import AFTER_SHIFT, match
from core.study.sweep_file import Sweep, read_sweep
from core.study.sweep_schema import METRICS

from .conftest import TWO, Write

SHIPPED = sorted(shipped_sweeps())


def error_in(file: Path, *, smoke: bool = False) -> str:
    """The error message for a file that cannot be right."""
    with pytest.raises(UserError) as caught:
        read_sweep(file, smoke=smoke)
    return str(caught.value)


@pytest.mark.full
def test_the_shipped_sweeps_are_those_that_were_asked_for() -> None:
    assert SHIPPED == [
        "attention",
        "balance_shift",
        "bias_rate",
        "mtp",
        "mtp_flops",
        "optimizers",
        "precision",
        "residual",
        "routing",
        "shared_experts",
    ]
    routing = read_sweep("routing")
    assert len(routing.variants) == 10
    assert len(routing.schema.seeds) == 5


@pytest.mark.full
@pytest.mark.parametrize("smoke", [False, True], ids=["full", "smoke"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_valid_and_its_variants_match(name: str, smoke: bool) -> None:
    sweep = read_sweep(name, smoke=smoke)
    found = match(sweep)
    assert set(found.documents) == {variant.name for variant in sweep.variants}
    assert sweep.schema.title.endswith("?")
    spent = {"training tokens", "steps"} if "flops" not in sweep.schema.budget else set()
    assert {"width", "depth", "corpus", "seed", *spent} <= set(found.held_equal)
    if smoke:
        assert sweep.schema.seeds == [0]
        most = 48 if sweep.schema.metric in AFTER_SHIFT else 3  # a whole window must follow a shift
        assert all(document["steps"] <= most for document in found.documents.values())


def test_equal_flops_are_those_of_whole_runs_within_a_step() -> None:
    found = match(read_sweep("mtp_flops"))
    spent = {name: d["flops_per_token"] * d["tokens"] for name, d in found.documents.items()}
    steps = {
        name: d["flops_per_token"] * d["tokens"] / d["steps"] for name, d in found.documents.items()
    }
    assert all(0 <= flops - 9.16e12 < steps[name] for name, flops in spent.items())
    assert "training FLOPs of a run within 2% of depth_0's" in found.held_equal
    assert not [line for line in [*found.held_equal, *found.not_equal] if "flops_per_token" in line]


@pytest.mark.full
def test_the_bias_rate_sweep_is_the_papers_table_and_long_enough_to_report() -> None:
    """arXiv 2408.15664: three rates of three rules, the loss, and softmax; the slowest bias can move by 0.2."""
    sweep = read_sweep("bias_rate")
    rules = {
        f"{rule}_1e-{n}" for rule in ("sign", "proportional", "multiplicative") for n in (2, 3, 4)
    }
    other = {"centred_1e-3", "loss_1e-3", "softmax_loss_3e-4", "softmax_proportional_1e-3"}
    assert {variant.name for variant in sweep.variants} == rules | other
    for variant in sweep.variants:
        if variant.name in rules:
            bias = variant.recipe.model.blocks["moe"].ffn.config.balance[0].config
            rule, _, rate = variant.name.partition("_")
            assert (bias.rate, bias.update == "proportional") == (
                float(rate),
                rule == "proportional",
            )
            assert (bias.form == "multiplicative") == (rule == "multiplicative")
    assert 1e-4 * match(sweep).documents["sign_1e-4"]["steps"] >= 0.2
    assert sweep.schema.metric == "max_vio_global"


def test_what_the_attention_sweep_compares_is_the_cache() -> None:
    documents = match(read_sweep("attention")).documents
    caches = {name: document["kv_bytes_per_token"] for name, document in documents.items()}
    assert caches == {"mla": 512, "mha": 2304, "gqa": 1024, "mqa": 512}


@pytest.mark.full
def test_a_variant_says_why_it_does_not_match() -> None:
    (message,) = [
        line for line in match(read_sweep("routing")).not_equal if line.startswith("switch")
    ]
    assert message.startswith("switch: flops_per_token ")
    assert message.endswith(
        "% of deepseek_v3's 22,894,560 (one coarse expert for a token instead of two)"
    )


def test_the_metrics_are_the_numbers_of_a_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    about_data = {"epochs", "sources"}
    measured = set(summary) - about_data - {"notices", "precision_paths", "peak_flops_source"}
    assert set(METRICS) == measured | set(AFTER_SHIFT)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("seeds: [3, 4]", "seeds: []", "seeds = []: must hold at least one seed"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "seeds = [3, 3]: must be different whole numbers"),
        ("seeds: [3, 4]", "seeds: [3, -1]", "seeds = [3, -1]: must be different whole numbers"),
        ("seeds: [3, 4]", "seeds: 3", "seeds = 3: must be"),
        ("seeds: [3, 4]", "", "seeds: required key is missing"),
        ("baseline: bias", "baseline: bais", "baseline = 'bais': no such variant; did you mean bias?"),
        ("bias: {{}}", "bias: {{overides: {{}}}}", "variants.bias.overides: unknown key; did you mean overrides?"),
        ("  none:", "  bias:", "the key 'bias' occurs twice"),
        ("  none:", "  a/b:", "'a/b' cannot name a folder"),
        ("  none:", "  ..:", "must not be empty or hold a dot"),
        ("budget: ", "metric: val_los\nbudget: ", "metric = 'val_los': no run logs it; did you mean val_loss"),
        ("budget: ", "metric: notices\nbudget: ", "metric = 'notices': no run logs it"),
        ("budget: ", "better: bigger\nbudget: ", "better = 'bigger': must be one of lower, higher"),
        ("budget: ", "matches: {{}}\nbudget: ", "matches: unknown key; did you mean match?"),
        ("budget: ", "match: {{params: 2}}\nbudget: ", "match.params = 2: must be at least 0 and less than 1"),
        ("budget: ", "match: {{exempt: {{nune: why}}}}\nbudget: ", "no variant is named 'nune'; did you mean none?"),
        ("budget: ", "smoke: {{sedes: [0]}}\nbudget: ", "smoke: unknown key 'sedes'; did you mean seeds?"),
        ("budget: ", "overrides: {{seed: 5}}\nbudget: ", "overrides: seed is given by `seeds`"),
        ("budget: ", "grid: {{budget.steps: [1]}}\nbudget: ", "budget.steps is given by `budget`, for every run"),
        ("budget: ", "grid: {{model.dim: []}}\nbudget: ", "model.dim must have at least one value"),
        ("budget: ", "grid: {{seed: [1]}}\nbudget: ", "seed is given by `seeds`"),
        ("budget: ", "grid: {{model.blocks.moe.ffn.experts: [8, 8]}}\nbudget: ", "named 'bias+experts=8'"),
        ("base: {base}", "base: nowhere", "nowhere: no such recipe"),
        ("title:", "- title:", "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(
    write: Write, before: str, after: str, expected: str
) -> None:
    assert before in TWO
    message = error_in(write(TWO.replace(before, after)))
    assert expected in message
    assert "question.yaml" in message


def test_all_variants_that_fail_are_reported_at_once(
    lab: Lab, write: Write, tmp_path: Path
) -> None:
    more = (
        "wide: {{overrides: {{model.dmi: 64}}}}",
        "lost: {{recipe: nowhere}}",
        "deep: {{overrides: {{model.dim: x}}}}",
    )
    file = write(TWO.replace("budget:", "".join(f"  {line}\n" for line in more) + "budget:"))
    result = lab.command("sweep", file, "--out", tmp_path / "out")
    assert result.code == 2
    lines = result.err.splitlines()
    assert lines[0].endswith("3 of 5 variants cannot run:")
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["wide", "lost", "deep"]
    assert "model.dmi: unknown key; did you mean dim" in lines[1]
    assert not (tmp_path / "out").exists()


def test_no_mistake_hides_another(write: Write) -> None:
    text = TWO.replace("[3, 4]", "[]").replace("baseline: bias", "baseline: bais")
    text = text.replace(
        "budget:", "  wide: {{overrides: {{model.dmi: 64}}}}\n  lost: {{recipee: x}}\nbudget:"
    )
    text += "metric: val_los\nmatsh: {{}}\nsmoke: {{budget: {{stesp: 1}}, sedes: [0]}}\n"
    first, *lines = error_in(write(text)).splitlines()
    assert first.endswith("question.yaml: 9 errors:")
    errors = [line.strip() for line in lines]
    for line in (
        "variants.lost.recipee: unknown key; did you mean recipe?",
        "matsh: unknown key; did you mean match?",
        "seeds = []: must hold at least one seed",
        "metric = 'val_los': no run logs it; did you mean val_loss",
        "smoke: unknown key 'sedes'; did you mean seeds?",
        "wide: ",
        "baseline = 'bais': no such variant; did you mean bias",
        "with --smoke: bias: ",
        "with --smoke: none: ",
    ):
        assert [each for each in errors if each.startswith(line)], line


def test_what_only_the_small_sizes_have_wrong_is_reported_without_them(write: Write) -> None:
    file = write(TWO + "smoke: {{seeds: []}}\n")
    assert error_in(file).endswith(
        "question.yaml: with --smoke: seeds = []: must hold at least one seed"
    )
    assert error_in(file, smoke=True) == error_in(file)


def test_a_name_that_no_folder_can_have_is_refused(write: Write) -> None:
    message = error_in(write(TWO.replace("none:", f"{'n' * 260}:")))
    assert message.endswith(f"{'n' * 40}...: a name of 260 bytes cannot name a folder: at most 200")
    assert len(read_sweep(write(TWO.replace("none:", f"{'n' * 200}:"))).variants) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_variants_that_cannot_run_here_are_refused_unless_they_run_elsewhere(
    lab: Lab, write: Write
) -> None:
    fast = "  fast: {{overrides: {{strategy.accelerator: cuda}}}}\n"
    odd = "  odd: {{overrides: {{model.attention.rope_dim: 3}}}}\n"
    file = write(TWO.replace("budget:", f"{fast}{odd}budget:"))
    lines = error_in(file).splitlines()
    assert lines[0].endswith("2 of 4 variants cannot run:")
    assert lines[1].startswith("  fast: cannot run here: strategy single: ")
    assert lines[2].startswith("  odd: ")
    with pytest.raises(UserError) as elsewhere:
        read_sweep(file, here=False)
    assert "1 of 4 variants" in str(elsewhere.value)


def test_a_sweep_that_is_not_there() -> None:
    with pytest.raises(UserError, match="routng: no such sweep; did you mean routing"):
        read_sweep("routng")


def test_keys_are_read_as_they_stand(write: Write) -> None:
    """YAML would make false of `no` and text of 1e-3."""
    sweep = read_sweep(
        write(
            TWO.replace("none:", "no:").replace(
                "  bias:", "  1e-3: {{overrides: {{optimizer.lr: 1e-3}}}}\n  bias:"
            )
        )
    )
    assert [variant.name for variant in sweep.variants] == ["1e-3", "bias", "no"]
    assert sweep.variants[0].overrides[0] == "optimizer.lr=0.001"


def test_a_grid_is_every_combination_and_names_say_it(write: Write) -> None:
    grid = "grid: {{optimizer.lr: [0.001, 1e-2], model.heads.mtp.depth: [1, 2]}}\nbaseline: bias+lr=0.001+depth=1"
    sweep = read_sweep(write(TWO.replace("baseline: bias", grid)))
    assert [variant.name for variant in sweep.variants][:4] == [
        "bias+lr=0.001+depth=1",
        "bias+lr=0.001+depth=2",
        "bias+lr=0.01+depth=1",
        "bias+lr=0.01+depth=2",
    ]
    assert len(sweep.variants) == 8
    assert "model.heads.mtp.depth=2" in sweep.variants[1].overrides
    message = error_in(
        write(TWO.replace("baseline: bias", grid.replace("lr=0.001+depth=1", "lr=0.1+depth=1")))
    )
    assert "did you mean bias+lr=0.01" in message


def test_smoke_lays_its_keys_over_the_file(write: Write) -> None:
    file = write(TWO + "smoke: {{seeds: [0], budget: {{steps: 1}}}}\n")
    small, full = read_sweep(file, smoke=True), read_sweep(file)
    assert (small.schema.seeds, small.schema.budget) == ([0], {"steps": 1})
    assert (full.schema.seeds, full.schema.budget) == ([3, 4], {"steps": 2})


def mismatched(write: Write, variant: str, rules: str = "") -> Sweep:
    """The two variants and a third."""
    match_ = f"match: {rules}\n" if rules else ""
    return read_sweep(
        write(TWO.replace("budget:", f"  third: {{{{overrides: {variant}}}}}\n{match_}budget:"))
    )


WIDE = "{{model.blocks.moe.ffn.expert_hidden: 24, optimizer.lr: 0.01}}"


def test_variants_that_do_not_match_are_refused_with_the_way_out(write: Write) -> None:
    with pytest.raises(UserError) as caught:
        match(mismatched(write, WIDE))
    first, *lines = str(caught.value).splitlines()
    assert "match.allow names what may differ, match.exempt a variant with the reason" in first
    assert [line.strip().split()[1] for line in lines] == [
        "params_total",
        "flops_per_token",
        "another",
    ]
    assert all(line.startswith("  third: ") for line in lines)
    assert "%" in lines[0]
    assert lines[2].strip() == "third: another optimizer and its schedule than bias"


def test_what_is_allowed_is_reported_as_not_equal(write: Write) -> None:
    rules = "{{params: 0.5, flops: null, allow: [optimizer and its schedule]}}"
    found = match(mismatched(write, WIDE, rules))
    assert found.not_equal == ["third: another optimizer and its schedule than bias"]
    assert "params_total within 50% of bias's" in found.held_equal
    assert not [line for line in found.held_equal if line.startswith("flops")]


def test_an_exempt_variant_is_reported_with_its_reason(write: Write) -> None:
    found = match(mismatched(write, WIDE, "{{exempt: {{third: it is wider}}}}"))
    assert len(found.not_equal) == 3
    assert all(line.endswith("(it is wider)") for line in found.not_equal)
    assert "params_total within 2% of bias's, but for third" in found.held_equal


def test_another_masking_of_documents_is_another_task(write: Write) -> None:
    with pytest.raises(UserError, match="third: another document masking than bias"):
        match(mismatched(write, "{{data.mask_documents: true}}"))


def test_nothing_unknown_can_be_allowed(write: Write) -> None:
    sweep = mismatched(write, WIDE, "{{allow: [atention]}}")
    with pytest.raises(
        UserError,
        match=r"match.allow: unknown name 'atention'; did you mean attention",
    ):
        match(sweep)


def test_equal_flops_may_take_different_steps(write: Write) -> None:
    third = "  third: {{overrides: {{model.heads.mtp: null}}}}\nbudget:"
    text = TWO.replace("steps: 2", "flops: 2.0e9").replace("budget:", third)
    file = write(text + "match: {{allow: [loss heads]}}\n")
    found = match(read_sweep(file))
    assert "training FLOPs of a run within 2% of bias's" in found.held_equal
    assert {line.split(" than ")[0] for line in found.not_equal} >= {
        "third: another steps",
        "third: another loss heads",
    }
    steps = {name: document["steps"] for name, document in found.documents.items()}
    assert steps["bias"] == steps["none"] < steps["third"]


@pytest.mark.full
def test_a_budget_of_flops_that_whole_steps_miss_is_refused(write: Write) -> None:
    """A budget of less than a step: one step of a model without the head spends less than one with it."""
    third = "  third: {{overrides: {{model.heads.mtp: null}}}}\nbudget:"
    text = TWO.replace("steps: 2", "flops: 1.5e7").replace("budget:", third)
    sweep = read_sweep(write(text + "match: {{allow: [loss heads]}}\n"))
    with pytest.raises(
        UserError,
        match=r"third: training FLOPs of a run [0-9,]+ is [+-][0-9.]+% of bias's [0-9,]+$",
    ):
        match(sweep)
    found = match(read_sweep(write(text + "match: {{flops: null, allow: [loss heads]}}\n")))
    assert not [line for line in found.held_equal if "FLOPs" in line]


def test_a_dry_run_lists_the_runs_and_starts_nothing(
    lab: Lab, write: Write, tmp_path: Path
) -> None:
    result = lab.command("sweep", write(TWO), "--out", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "4 runs: 2 variants x 2 seeds"
    assert [line for line in result.out.splitlines() if line.startswith("run: ")] == [
        *("run: bias/seed-3", "run: none/seed-3", "run: bias/seed-4", "run: none/seed-4")
    ]
    assert "equal: width" in result.out
    assert not (tmp_path / "out").exists()


def test_no_worker_is_refused(lab: Lab, write: Write) -> None:
    assert (
        lab.command("sweep", write(TWO), "--workers", "0").sentence
        == "--workers = 0: must be at least 1"
    )


def test_more_workers_than_cores_are_as_many_as_cores(
    lab: Lab, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("core.study.cores.cores", lambda: 3)
    monkeypatch.setattr(
        "core.study.sweep.run_sweep", lambda *_, workers, **__: print(workers) or {"rows": []}
    )
    result = lab.command("sweep", write(TWO), "--workers", "9", "--json", "--out", tmp_path / "out")
    assert result.out.splitlines()[0] == "3"
    assert "note: --workers = 9: 3 runs at a time, as this machine has 3 cores" in result.err


def test_every_shipped_sweep_says_its_command() -> None:
    for name, file in shipped_sweeps().items():
        assert f"python -m core.sweep recipes/sweeps/{name}.yaml" in file.read_text(
            encoding="utf-8"
        )
        assert file.relative_to(ROOT) == Path("recipes/sweeps") / f"{name}.yaml"
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["smoke"]["seeds"] == [0]
