"""Checks of corpora, and of the components that make objects for Lightning and torch."""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from core.contracts.corpus import Split, TokenCorpus
from core.contracts.errors import UserError
from core.contracts.schedule import Progress
from core.contracts.strategy import StrategyFactory
from core.contracts.training import NamedParameter, ParameterKind
from core.model.initialise import initialise
from core.model.parameters import check_groups
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, state

TRAINING = "core/contracts/training.py"
CORPUS = "core/contracts/corpus.py, Corpus"
ARGUMENTS = {"accelerator", "devices", "num_nodes", "strategy", "plugins", "sync_batchnorm"}
"""Keyword arguments of `lightning.Trainer` that choose devices and how they share the work."""

WEIGHTS: dict[ParameterKind, tuple[str, tuple[int, ...]]] = {
    "table": ("embedding", (5, 4)),
    "matrix": ("ffn.down", (3, 2)),
    "stack": ("experts.down", (4, 3, 2)),
    "vector": ("norm", (3,)),
}
"""A role and a shape for each kind of parameter."""


@check(
    "optimizer",
    clause="`make` returns torch optimizers that hold each weight in exactly one group",
    where=f"{TRAINING}, OptimizerFactory",
)
def optimizer_is_torchs(subject: Subject) -> None:
    """Takes a step, which must move every parameter, loads the state again, and reads learning rates of a run."""
    factory = subject.factory()
    named = []
    for kind, (role, shape) in WEIGHTS.items():
        parameter = torch.nn.Parameter(torch.ones(shape))
        named.append(NamedParameter(f"{kind}.weight", parameter, role, kind))
    made = factory.make(named)
    optimizers = made if isinstance(made, list) else [made]
    require(all(isinstance(one, torch.optim.Optimizer) for one in optimizers), f"made {made!r}")
    try:
        check_groups(optimizers, named)
    except ValueError as error:
        require(False, str(error))
    rates = [factory.learning_rate(Progress(step, step, 100, 100)) for step in (1, 50, 100)]
    require(all(0 <= rate < float("inf") for rate in rates), f"learning rates {rates}")
    draw = torch.Generator().manual_seed(0)
    for weight in named:
        weight.parameter.grad = torch.rand(weight.parameter.shape, generator=draw) + 0.5
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for weight in named:
        require(bool((weight.parameter != 1).all()), "a parameter did not move")


@check(
    "corpus",
    clause="documents have unique names and UTF-8 text; what cannot be read is a UserError",
    where=CORPUS,
)
def documents_are_named_text(subject: Subject) -> None:
    """Reads the first hundred documents twice; both readings must be the same."""
    of_tokens = isinstance(subject.factory(), TokenCorpus)
    skip_unless(not of_tokens, "a corpus of tokens has no documents")
    try:
        first = list(islice(subject.factory().documents(), 100))
        again = list(islice(subject.factory().documents(), 100))
    except UserError as error:
        skip_unless(False, f"the example's text is not here: {error}")
        return
    require(first, "no document")
    names = {document.name for document in first}
    require(len(names) == len(first), "two documents have one name")
    require(first == again, "a second reading gives other documents")
    for document in first:
        document.data.decode("utf-8")


@check(
    "corpus",
    clause="token blocks come in the same order each time, with ids of the vocabulary and masks of their length",
    where="core/contracts/corpus.py, TokenCorpus",
)
def token_blocks_are_stable(subject: Subject) -> None:
    """Reads the first hundred blocks of each split twice, and compares the tokenizer with the vocabulary."""
    corpus = subject.factory()
    skip_unless(isinstance(corpus, TokenCorpus), "a corpus of text")
    for split in get_args(Split):
        first = list(islice(corpus.blocks(split), 100))
        again = list(islice(corpus.blocks(split), 100))
        require(first == again, "a second reading gives other blocks")
        for block in first:
            require(len(block.tokens) > 0, "an empty block")
            known = all(0 <= token < corpus.vocabulary for token in block.tokens)
            require(known, "an id outside of the vocabulary")
            if block.learned is not None:
                require(len(block.learned) == len(block.tokens), "a mask of another length")
    entries = len(json.loads(corpus.tokenizer_json())["model"]["vocab"])
    found = f"a tokenizer of {entries} entries for {corpus.vocabulary}"
    require(entries <= corpus.vocabulary, found)


@check(
    "strategy",
    clause="`trainer_arguments` are keyword arguments of lightning.Trainer",
    where=f"{TRAINING}, StrategyFactory",
)
def strategy_gives_trainer_arguments(subject: Subject) -> None:
    """Allows only the arguments that choose devices and how they share the work."""
    others = sorted(set(subject.factory().trainer_arguments()) - ARGUMENTS)
    require(not others, f"other arguments: {', '.join(others)}")


@check(
    "strategy",
    clause="`parallelize` renames no parameter, changes no shape, and leaves every initial weight as it is",
    where=f"{TRAINING}, StrategyFactory: `parallelize`",
)
def sharded_weights_are_the_whole_models(subject: Subject) -> None:
    """Builds the kit's model on meta, shards it over one process, draws its weights, and compares an unsharded one."""
    factory = subject.factory()
    shards = type(factory).parallelize is not StrategyFactory.parallelize
    skip_unless(shards, "it shards no weights")
    skip_unless(not dist.is_initialized(), "this process is already part of a process group")
    whole = state(subject.model())
    sharded = subject.model(meta=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        factory.parallelize(sharded, init_device_mesh("cpu", (1,)))
        initialise(sharded.to_empty(device="cpu"), 0)
        weights: dict[str, Tensor] = {}
        sharded_weights = 0
        for name, value in sharded.state_dict().items():
            if isinstance(value, DTensor):
                value = value.full_tensor()
                sharded_weights += 1
            weights[name] = value
    finally:
        dist.destroy_process_group()
    require(sharded_weights, "no weight was sharded")
    renamed = ", ".join(sorted(set(weights) ^ set(whole)))
    require(list(weights) == list(whole), f"renamed: {renamed}")
    reshaped = [name for name, value in weights.items() if value.shape != whole[name].shape]
    require(not reshaped, f"other shapes: {', '.join(reshaped)}")
    different = [name for name, value in weights.items() if not torch.equal(value, whole[name])]
    require(not different, f"other initial weights: {', '.join(different)}")


@check("callback", "logger", clause="`make` returns a Lightning callback or logger", where=TRAINING)
def lightning_objects_are_made(subject: Subject) -> None:
    """Makes one in a temporary folder."""
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    kind: type = Callback
    more: dict[str, Any] = {}
    if subject.entry.slot == "logger":
        kind = Logger
        more = {"resumed_at": None}
    with tempfile.TemporaryDirectory() as folder:
        made = subject.factory().make(Path(folder), **more)
        require(isinstance(made, kind), f"made a {type(made).__name__}")
