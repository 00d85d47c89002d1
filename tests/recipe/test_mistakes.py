"""Every kind of mistake gives one sentence: where it was set, key path, value, what is allowed (P28, P29)."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.recipe.compose import compose
from core.recipe.recipe_schema import RecipeSchema

Write = Callable[..., Path]
MessageOf = Callable[..., str]

ROOT = Path(__file__).resolve().parents[2]
ALL_KEYS = ", ".join(sorted([*RecipeSchema.__dataclass_fields__, "extends"]))
FREE_KEYS = (
    "benchmark, detect_anomaly, deterministic, enable_model_summary, enable_progress_bar, inference_mode, "
    "log_every_n_steps, profiler, sync_batchnorm"
)

# What the core reports by itself. {o} is replaced by where an override was set, {f} for the file, and … for names that
# grow with the repository.
CORE = {
    "modl.dim=3": f"{{o}}: modl: unknown key; did you mean model? known: {ALL_KEYS}",
    "model.dims=3": "{o}: model.dims: unknown key; did you mean dim? "
    "known: attention, blocks, dim, heads, init, norm_eps, residual, rope, ropes, tied_embedding",
    "model.blocks.moe.cuont=1": "{o}: model.blocks.moe.cuont: unknown key; did you mean count? "
    "known: attention, count, ffn",
    "seed=one": "{o}: seed = 'one': must be a whole number",
    "model.dim=3.5": "{o}: model.dim = 3.5: must be a whole number",
    "model.dim=true": "{o}: model.dim = true: must be a whole number",
    "model.dim=null": "{o}: model.dim = null: must be a whole number",
    "model.dim=[1]": "{o}: model.dim = [1]: must be a whole number",
    "model.dim={a: 1}": "{o}: model.dim: must be a whole number",
    "model.dim=???": "{o}: model.dim: a value must be given in place of ???",
    "model.norm_eps=???": "{o}: model.norm_eps: a value must be given in place of ???",
    "model.norm_eps=small": "{o}: model.norm_eps = 'small': must be a number",
    "model.norm_eps=true": "{o}: model.norm_eps = true: must be a number",
    "model.norm_eps=.nan": "{o}: model.norm_eps = nan: must be finite",
    "model.norm_eps=-.inf": "{o}: model.norm_eps = -inf: must be finite",
    "model.dim=.inf": "{o}: model.dim = inf: must be a whole number",
    "gradient_clip=inf": "{o}: gradient_clip = inf: must be finite",
    "trainer.log_every_n_steps=.inf": "{o}: trainer.log_every_n_steps = inf: must be finite",
    "smoke={batch: {sequences: .nan}}": "{o}: smoke.batch.sequences = nan: must be finite",
    "model.norm_eps=0": "{o}: model.norm_eps = 0: must be more than 0 and finite",
    "gradient_clip=often": "{o}: gradient_clip = 'often': must be a number or null",
    "gradient_clip=0": "{o}: gradient_clip = 0: must be more than 0, or null for no clipping",
    "compile=maybe": "{o}: compile = 'maybe': must be true or false",
    "compile=1": "{o}: compile = 1: must be true or false",
    "compile=null": "{o}: compile = null: must be true or false",
    "initial_weights=[a]": "{o}: initial_weights = ['a']: "
    "must be a string or a selection (keys: path, include, exclude, experts, scale, noise, vocabulary) or null",
    "initial_weights=true": "{o}: initial_weights = true: "
    "must be a string or a selection (keys: path, include, exclude, experts, scale, noise, vocabulary) or null",
    "recompute.blocks=moe": "{o}: recompute.blocks = 'moe': must be a list, each item a string",
    "recompute.blocks=null": "{o}: recompute.blocks = null: must be a list, each item a string",
    "recompute.blocks=[true]": "{o}: recompute.blocks = [True]: must be a list, each item a string",
    "recompute.blocks=[mo]": "{o}: recompute.blocks = ['mo']: must name blocks of the model: dense, moe",
    "plugins=my_plugin": "{o}: plugins = 'my_plugin': must be a list, each item a string",
    "batch=4": "{o}: batch = 4: must be a section of keys: sequences, accumulate",
    "batch=[4]": "{o}: batch = [4]: must be a section of keys: sequences, accumulate",
    "batch=null": "{o}: batch = null: must be a section of keys: sequences, accumulate",
    "model.blocks=[1]": "{o}: model.blocks = [1]: must map names to sections",
    "model.blocks.dense=1": "{o}: model.blocks.dense = 1: must be a section of keys: count, ffn, attention",
    "model.blocks={a.b: {count: 1}}": "{o}: model.blocks: a name must not be empty or hold a dot, as 'a.b' does",
    "model.blocks={dense: {count: 0}, moe: {count: 0}}": "{o}: model.blocks: must hold at least one block",
    "model.blocks.dense.count=-1": "{o}: model.blocks.dense.count = -1: must be at least 0",
    "model.dim=0": "{o}: model.dim = 0: must be at least 1",
    "model.heads={next_token: null}": "{o}: model.heads: must hold at least one loss head",
    "model.heads={a/b: {name: next_token}}": "{o}: model.heads: 'a/b' cannot name a head: use letters, digits and _, "
    "and begin with a letter",
    "model.heads={_modules: {name: next_token}}": "{o}: model.heads: '_modules' cannot name a head: use letters, "
    "digits and _, and begin with a letter",
    "model.heads={parameters: {name: next_token}}": "{o}: model.heads: 'parameters' cannot name a head: "
    "torch's modules or our logs use this name; choose another",
    "model.heads={keys: {name: next_token}}": "{o}: model.heads: 'keys' cannot name a head: "
    "torch's modules or our logs use this name; choose another",
    "seed=-1": "{o}: seed = -1: must be at least 0",
    "trainer.log_every_n_steps=0": "{o}: trainer.log_every_n_steps = 0: must be a whole number of at least 1",
    "trainer.profiler=fast": "{o}: trainer.profiler = 'fast': must be null or one of simple, advanced, pytorch",
    "trainer.benchmark=yes please": "{o}: trainer.benchmark = 'yes please': must be true, false or null",
    "trainer.detect_anomaly=1": "{o}: trainer.detect_anomaly = 1: must be true or false",
    "trainer.deterministic=maybe": "{o}: trainer.deterministic = 'maybe': must be true, false or warn",
    "model.rope={theta: 1, yarn: {factor: 40}}": "{o}: model.rope.theta = 1: must be more than 1 with yarn, which "
    "counts the rotations of each frequency",
    "model.rope.yarn={factor: 40, beta_fast: .inf}": "{o}: model.rope.yarn.beta_fast = inf: must be finite",
    "model.rope.yarn={factor: 40, mscale: .inf}": "{o}: model.rope.yarn.mscale = inf: must be finite",
    "model.heads=null": "{o}: model.heads = null: must map names to sections",
    "data.tokenizer.vocab=0": "{o}: data.tokenizer.vocab = 0: must be at least 1",
    "data.sequence_length=4097": "{o}: data.sequence_length = 4097: must be at most model.rope.max_length = 4096",
    "model.rope.max_length=63": "{f}: data.sequence_length = 64: must be at most model.rope.max_length = 63",
    "model.rope={yarn: {factor: 2}, max_length: 8193}": "{o}: model.rope.max_length = 8193: "
    "must be at most 8192, as far as yarn reaches",
    "model.rope.yarn=2": "{o}: model.rope.yarn = 2: must be a section of keys: "
    "factor, original_length, beta_fast, beta_slow, mscale, mscale_all_dim",
    "model.rope.yarn={}": "{o}: model.rope.yarn.factor: required key is missing "
    "(how many times longer the context gets)",
    "budget={steps: 5, tokens: 1e6}": "{o}: budget.tokens = 1000000: exactly one of steps, tokens, flops must be given"
    ", and steps and tokens are; set the others to null",
    "budget.steps=null": "{o}: budget.steps = null: exactly one of steps, tokens, flops must be given",
    "budget.steps=0": "{o}: budget.steps = 0: must be at least 1",
    "budget={steps: null, flops: .inf}": "{o}: budget.flops = inf: must be finite",
    "batch.accumulate=0": "{o}: batch.accumulate = 0: must be at least 1",
    "batch.accumulate=1.5": "{o}: batch.accumulate = 1.5: must be a whole number",
    "batch.accumulate={start: 1, segments: [{until: 0.5, to: 2, shape: linear}]}": "{o}: batch.accumulate.unit = "
    "'fraction': must be tokens or steps if the run's length is given in steps (budget.steps)",
    "model.attention=mla": "{o}: model.attention = 'mla': must be a section with a `name` (attention: …",
    "model.attention={name: 3}": "{o}: model.attention: must be a section with a `name` (attention: …",
    "optimizer=null": "{o}: optimizer = null: must be a section with a `name` (optimizer: …",
    "loggers=csv": "{o}: loggers = 'csv': must be a list of logger sections",
    "loggers=[csv]": "{o}: loggers.0 = 'csv': must be a section with a `name` (logger: …",
    "model.attention.name=mlaa": "{o}: model.attention.name: no attention is named 'mlaa'; did you mean mla? known: …",
    "optimizer.name=adamW": "{o}: optimizer.name: no optimizer is named 'adamW'; did you mean adamw…",
    "trainer.max_steps=5": "{o}: trainer.max_steps: another key of the recipe sets this; use budget",
    "trainer.precision=16": "{o}: trainer.precision: another key of the recipe sets this; use precision",
    "trainer.accumulate_grad_batches=2": "{o}: trainer.accumulate_grad_batches: another key of the recipe sets this; "
    "use batch.accumulate",
    "trainer.benchmrk=true": f"{{o}}: trainer.benchmrk: unknown key; did you mean benchmark? known: {FREE_KEYS}",
    "trainer=3": "{o}: trainer = 3: must be a section of keys",
    "smoke=3": "{o}: smoke = 3: must be a section of keys",
    "model.dim=${model.width}": "{o}: model.dim: refers to a key that the recipe does not hold "
    "(Interpolation key 'model.width' not found)",
    "model.dim=${model.dim}": "{o}: model.dim: cannot be worked out: Recursive interpolation detected",
    "model.dim=${model.norm_eps": "command line: 'model.dim=${model.norm_eps': the value cannot be read: "
    "no viable alternative at input '${model.norm_eps'",
    "seed": "command line: 'seed': an override must have the form KEY.PATH=VALUE",
    "=3": "command line: '=3': an override must have the form KEY.PATH=VALUE",
    "model..dim=3": "command line: 'model..dim=3': an override must have the form KEY.PATH=VALUE",
    "seed=[1": "command line: 'seed=[1': the value cannot be read: did not find expected ',' or ']'",
    "seed.x=3": "command line: 'seed.x=3': seed = 1 has no keys",
    "model.dim.x.y=3": "command line: 'model.dim.x.y=3': model.dim = 32 has no keys",
    "extends=other": "command line: 'extends=other': only a file can extend another",
}
BALANCE = "model.blocks.moe.ffn.balance"
ROUTER = "model.blocks.moe.ffn.router"

# What only a component's own `Config` can report.
COMPONENTS = {
    "optimizer.learning_rate=1": "{o}: optimizer.learning_rate: unknown key; "
    "known: betas, eps, lr, moments, name, no_decay, weight_decay",
    "precision.naem=fp32": "{o}: precision.naem: unknown key; did you mean name? known: name",
    f"{ROUTER}.topk=2": f"{{o}}: {ROUTER}.topk: unknown key; did you mean top_k? "
    "known: affinity, group_limit, group_score, groups, name, normalise, scale, top_k",
    f"{ROUTER}.name=deepsek_v3": f"{{o}}: {ROUTER}.name: no router is named 'deepsek_v3'; did you mean deepseek_v3…",
    f"{ROUTER}.top_k=5": f"{{o}}: {ROUTER}.top_k = 5: must be between 2 and 4, the experts that the group limit leaves "
    "(2 of 4 groups of 2)",
    f"{ROUTER}.top_k=0": f"{{o}}: {ROUTER}.top_k = 0: must be between 2 and 4, the experts that the group limit leaves "
    "(2 of 4 groups of 2)",
    f"{ROUTER}.groups=3": f"{{o}}: {ROUTER}.groups = 3: must divide experts = 8",
    f"{ROUTER}.group_limit=5": f"{{o}}: {ROUTER}.group_limit = 5: must be between 1 and groups = 4",
    "model.blocks.moe.ffn.experts=7": f"{{f}}: {ROUTER}.groups = 4: must divide experts = 7",
    "model.blocks.dense.ffn.hidden=-48": "{o}: model.blocks.dense.ffn.hidden = -48: must be at least 1",
    "model.attention.heads=5": "{o}: model.attention.heads = 5: must divide model.dim = 32 if head_dim is not given",
    "model.blocks.dense.attention={name: mha, heads: 5}": "{o}: model.blocks.dense.attention.heads = 5: "
    "must divide model.dim = 32 if head_dim is not given",
    "model.attention={name: gqa, kv_heads: 3}": "{o}: model.attention.kv_heads = 3: must divide heads = 4",
    "model.attention.name=mla": "{o}: model.attention.kv_rank: required key is missing "
    "(width of the key-value latent (d_c))",
    "optimizer.betas=0.9": "{o}: optimizer.betas = 0.9: must be a list, each item a number",
    "optimizer.betas=[a, b]": "{o}: optimizer.betas = ['a', 'b']: must be a list, each item a number",
    "optimizer.betas=[true, 0.9]": "{o}: optimizer.betas = [True, 0.9]: must be a list, each item a number",
    "optimizer.betas=[0.9]": "{o}: optimizer.betas = [0.9]: must be two numbers in [0, 1)",
    "optimizer.lr=fast": "{o}: optimizer.lr = 'fast': must be a number or a schedule "
    "(keys: start, unit, segments, wsd)",
    "optimizer.lr=[1]": "{o}: optimizer.lr = [1]: must be a number or a schedule (keys: start, unit, segments, wsd)",
    "optimizer.lr=null": "{o}: optimizer.lr = null: must be a number or a schedule (keys: start, unit, segments, wsd)",
    "optimizer.lr=-1": "{o}: optimizer.lr = -1: must be at least 0",
    "optimizer.lr=.inf": "{o}: optimizer.lr = inf: must be finite",
    "optimizer.eps=nan": "{o}: optimizer.eps = nan: must be finite",
    "optimizer.weight_decay=.inf": "{o}: optimizer.weight_decay = inf: must be finite",
    "optimizer.betas=[0.9, .nan]": "{o}: optimizer.betas.1 = nan: must be finite",
    "optimizer.lr={start: .inf}": "{o}: optimizer.lr.start = inf: must be finite",
    "data.corpus.paths=[.inf]": "{o}: data.corpus.paths = [inf]: must be a list, each item a string",
    f"{BALANCE}.0=3": f"{{o}}: {BALANCE}.0 = 3: must be a section with a `name` (balancer: …",
    f"{BALANCE}.0.rte=3": f"{{o}}: {BALANCE}.0.rte: unknown key; did you mean rate? "
    "known: centre, form, frozen, name, rate, unit, update",
    f"{BALANCE}.2.rate=3": f"command line: '{BALANCE}.2.rate=3': {BALANCE} has 2 items, numbered from 0, and no '2'",
    f"{BALANCE}.-1.rate=3": f"command line: '{BALANCE}.-1.rate=3': {BALANCE} has 2 items, numbered from 0, and no '-1'",
    f"{BALANCE}.rate=3": f"command line: '{BALANCE}.rate=3': {BALANCE} has 2 items, numbered from 0, and no 'rate'",
    "strategy={name: ddp, ranks: 3}": "{o}: strategy.ranks = 3: must divide batch.sequences = 4",
    "strategy.accelerator=[cpu]": "{o}: strategy.accelerator = ['cpu']: must be one of auto, cpu, cuda",
}


def hold(sentence: str, pattern: str, file: Path, override: str) -> None:
    expected, opened, _ = (
        pattern.replace("{o}", f"command line ({override})")
        .replace("{f}", str(file))
        .partition("…")
    )
    assert (sentence[: len(expected)] if opened else sentence) == expected


@pytest.mark.parametrize("override", CORE)
def test_a_mistake_in_a_key_of_the_core(override: str, base: Path, message_of: MessageOf) -> None:
    hold(message_of(base, override), CORE[override], base, override)


@pytest.mark.parametrize("override", COMPONENTS)
def test_P29_a_mistake_in_a_key_of_a_component(
    override: str, base: Path, message_of: MessageOf
) -> None:
    hold(message_of(base, override), COMPONENTS[override], base, override)


SCRIPT = """
import json, sys

from core.contracts.errors import UserError
from core.recipe.compose import compose

found = {}
for override in json.loads(sys.argv[2]):
    try:
        compose(sys.argv[1], [override])
    except UserError as error:
        components = [m for m in sys.modules if m.startswith("plugins.") and m.count(".") > 1]
        found[override] = [str(error), components, [m for m in ("torch", "lightning") if m in sys.modules]]
print(json.dumps(found))
"""


def test_P28_P43_the_mistakes_of_the_core_are_reported_before_any_component_or_torch_is_imported(
    base: Path,
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(base), json.dumps(list(CORE))]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(CORE)
    for override, (sentence, components, heavy) in found.items():
        assert not components, f"{override} was reported after importing {components}"
        assert not heavy, f"{override} was reported after importing {heavy}"
        hold(sentence, CORE[override], base, override)


def test_a_plugin_that_the_recipe_names_is_not_imported_before_the_core_keys_are_right(
    base: Path, message_of: MessageOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loom_never.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "model.dims: unknown key" in message_of(base, "plugins=[loom_never]", "model.dims=1")
    assert "loom_never" not in sys.modules
    assert message_of(base, "plugins=[loom_never]") == (
        "command line (plugins=[loom_never]): plugins: plugin 'loom_never', which the recipe names, is broken: "
        "AssertionError: imported"
    )


def test_a_plugin_module_that_does_not_exist(base: Path, message_of: MessageOf) -> None:
    assert message_of(base, "plugins=[loom_nowhere]") == (
        "command line (plugins=[loom_nowhere]): plugins: plugin 'loom_nowhere', which the recipe names, is broken: "
        "ModuleNotFoundError: No module named 'loom_nowhere'; Python must find it from here: "
        "install its package, or run from the folder that holds it"
    )


def test_a_balancer_needs_what_the_router_has(
    base: Path, message_of: MessageOf, fake_plugin: str
) -> None:
    assert message_of(base, f"plugins=[{fake_plugin}]", f"{ROUTER}.name=plain") == (
        f"{base}: {BALANCE}.0: bias needs a router that selects through the balancers' bias, and plain does not"
    )


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        ("budget: {steps: 10}\n", "budget: required key is missing (how long the run is)"),
        ("  dim: 32\n", "model.dim: required key is missing (width of the residual stream)"),
        (
            "sequences: 4",
            "batch.sequences: required key is missing (sequences in a micro-batch, over all data ranks together)",
        ),
        (", hidden: 48", "model.blocks.dense.ffn.hidden: required key is missing (inner width)"),
        (
            "top_k: 2, ",
            "model.blocks.moe.ffn.router.top_k: required key is missing (experts per token (K_r))",
        ),
        (", lr: 0.001", "optimizer.lr: required key is missing (learning rate)"),
        ("name: adamw, ", "optimizer: must be a section with a `name` (optimizer: "),
    ],
)
def test_a_required_key_that_is_missing(
    left_out: str, why: str, base: Path, message_of: MessageOf
) -> None:
    text = base.read_text()
    assert text.count(left_out) == 1
    base.write_text(text.replace(left_out, ""))
    assert message_of(base).startswith(f"{base}: {why}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model:\n  dim: [3\n  seed: 4\n", ", line 3, column 7: cannot be read: did not find expected ',' or ']'"),
        ("model:\n\tdim: 3\n", ", line 2, column 1: cannot be read: found character that cannot start any token"),
        ("seed: 1\nmodel: {}\nseed: 2\n", ", line 3, column 1: cannot be read: found duplicate key seed"),
        ("model:\n  dim: 1\n  dim: 2\n", ", line 3, column 3: cannot be read: found duplicate key dim"),
        ("model: *nothing\n", ", line 1, column 8: cannot be read: found undefined alias"),
        ("seed: !!python/object:os.kill {}\n", ", line 1, column 7: cannot be read: could not determine a constructor"),
        ("- seed: 1\n- model: {}\n", ": must be a section of keys: seed, plugins, model, precision, data"),
        ("", ": model: required key is missing (the model)"),
        ("hello\n", ": must be a section of keys: seed, plugins, model, precision, data"),
        ("null: 1\n", ": cannot be read: Incompatible key type 'null'"),
        ("seed: ${sed}\n", ": seed: refers to a key that the recipe does not hold (Interpolation key 'sed' not found)"),
        ("sëed: 1\n", f": sëed: unknown key; did you mean seed? known: {ALL_KEYS}"),
        ("extend: other\n", f": extend: unknown key; did you mean extends or seed? known: {ALL_KEYS}"),
    ],
    ids=["open list", "tab", "key twice", "inner key twice", "alias", "tag", "list", "empty", "scalar", "null key",
         "interpolation", "unicode key", "extend"],
)  # fmt: skip
def test_a_file_that_is_no_recipe(text: str, why: str, write: Write, message_of: MessageOf) -> None:
    file = write(text)
    expected = f"{file}{why}"
    assert message_of(file)[: len(expected)] == expected


def test_a_file_that_is_not_utf_8(write: Write, message_of: MessageOf) -> None:
    file = write("")
    file.write_bytes(b"seed: 1 # \xff\xfe\n")
    assert message_of(file).startswith(f"{file}: cannot be read: it is not UTF-8 text (byte 0xff")


def test_a_missing_file_is_reported_with_the_nearest_shipped_names(
    message_of: MessageOf, tmp_path: Path
) -> None:
    for path in ("dsv3_smal", "recipes/dsv3_smal.yaml", "dsv3_smal.yaml"):
        assert message_of(path).startswith(f"{path}: no such recipe; did you mean dsv3_small")
    assert "known: " in message_of(tmp_path / "dsv3_small.yaml")


def test_a_folder_is_no_recipe(message_of: MessageOf, tmp_path: Path) -> None:
    assert message_of(tmp_path).startswith(f"{tmp_path}: a folder, not a recipe; known: ")
    assert message_of("").startswith("'': no such recipe; known: ")


def test_a_shipped_name_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("dsv3_small", "dsv3_small.yaml", "recipes/dsv3_small.yaml"):
        assert compose(path, ["loggers=[]"]).name == "dsv3_small"


def test_extends_of_a_missing_file_names_both(write: Write, message_of: MessageOf) -> None:
    file = write("extends: dsv3_smal\n")
    assert message_of(file).startswith(
        f"{file}: extends = 'dsv3_smal': no such recipe; did you mean dsv3_small"
    )


def test_extends_goes_one_level(base: Path, write: Write, message_of: MessageOf) -> None:
    write("extends: base.yaml\n", "middle.yaml")
    file = write("extends: middle.yaml\n")
    assert message_of(file) == (
        f"{file}: extends = 'middle.yaml': that file extends another one, and only one level is allowed"
    )
    loop = write("extends: loop.yaml\n", "loop.yaml")
    assert "only one level is allowed" in message_of(loop)


@pytest.mark.parametrize(
    ("value", "shown"), [("", "null"), ("[a, b]", "['a', 'b']"), ("3", "3"), ("''", "''")]
)
def test_extends_names_one_file(
    value: str, shown: str, write: Write, message_of: MessageOf
) -> None:
    file = write(f"extends: {value}\n")
    assert message_of(file) == f"{file}: extends = {shown}: must be the name of one file"


def test_a_value_left_open_by_the_base_must_be_given(
    base: Path, write: Write, message_of: MessageOf
) -> None:
    base.write_text(base.read_text().replace("dim: 32", "dim: ???"))
    assert message_of(base) == f"{base}: model.dim: a value must be given in place of ???"
    file = write("extends: base.yaml\nmodel: {dim: 48}\n")
    assert compose(file).model.dim == 48


def test_a_long_value_is_shown_in_part(base: Path, message_of: MessageOf) -> None:
    found = message_of(base, f"compile={'x' * 500}")
    assert "compile = '" + "x" * 76 + "...: must be true or false" in found
