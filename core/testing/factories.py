"""The contracts of what is handed to Lightning and torch, and of corpora."""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from core.contracts.corpus import Split, TokenCorpus
from core.contracts.errors import UserError
from core.contracts.schedule import Progress
from core.contracts.training import NamedParameter, ParameterKind, StrategyFactory
from core.model.initialise import initialise
from core.model.parameters import check_groups
from core.testing.clauses import check, hold, spare
from core.testing.subject import Subject, state

TRAINING, CORPUS = "core/contracts/training.py", "core/contracts/corpus.py, Corpus"
ARGUMENTS = {"accelerator", "devices", "num_nodes", "strategy", "plugins", "sync_batchnorm"}


@check(
    "optimizer",
    clause="`make` gives torch optimizers in which every weight is in one group",
    where=f"{TRAINING}, OptimizerFactory",
)
def optimizer_is_torchs(subject: Subject) -> None:
    """A step at the learning rate that `learning_rate` gives moves every parameter; the state round trips."""
    factory = subject.factory()
    shapes: dict[ParameterKind, tuple[int, ...]] = {
        "table": (5, 4),
        "matrix": (3, 2),
        "stack": (4, 3, 2),
        "vector": (3,),
    }
    roles = {"table": "embedding", "matrix": "ffn.down", "stack": "experts.down", "vector": "norm"}
    named = [
        NamedParameter(f"{kind}.weight", torch.nn.Parameter(torch.ones(shape)), roles[kind], kind)
        for kind, shape in shapes.items()
    ]
    made = factory.make(named)
    optimizers = made if isinstance(made, list) else [made]
    hold(all(isinstance(one, torch.optim.Optimizer) for one in optimizers), f"made {made!r}")
    try:
        check_groups(optimizers, named)
    except ValueError as wrong:
        hold(False, str(wrong))
    rates = [factory.learning_rate(Progress(step, step, 100, 100)) for step in (1, 50, 100)]
    hold(all(0 <= rate < float("inf") for rate in rates), f"learning rates {rates}")
    draw = torch.Generator().manual_seed(0)
    for weight in named:
        weight.parameter.grad = torch.rand(weight.parameter.shape, generator=draw) + 0.5
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    hold(all(bool((weight.parameter != 1).all()) for weight in named), "a parameter did not move")


@check("corpus", clause="documents have unique names and UTF-8 text; what cannot be read is a UserError", where=CORPUS)
def documents_are_named_text(subject: Subject) -> None:
    """The first hundred, twice: the same both times."""
    spare(not isinstance(subject.factory(), TokenCorpus), "a corpus of tokens has no documents")
    try:
        first, again = ([*islice(subject.factory().documents(), 100)] for _ in range(2))
    except UserError as told:
        spare(False, f"the example's text is not here: {told}")
        return
    hold(first, "no document")
    hold(len({d.name for d in first}) == len(first), "two documents have one name")
    hold(first == again, "a second reading gives other documents")
    for document in first:
        document.data.decode("utf-8")


@check(
    "corpus",
    clause="token blocks come in the same order each time, with ids of the vocabulary and masks of their length",
    where="core/contracts/corpus.py, TokenCorpus",
)
def token_blocks_are_stable(subject: Subject) -> None:
    """The first hundred of each split, twice; the tokenizer has as many entries as the vocabulary."""
    corpus = subject.factory()
    spare(isinstance(corpus, TokenCorpus), "a corpus of text")
    for split in get_args(Split):
        first, again = ([*islice(corpus.blocks(split), 100)] for _ in range(2))
        hold(first == again, "a second reading gives other blocks")
        for block in first:
            hold(len(block.tokens) > 0, "an empty block")
            hold(all(0 <= token < corpus.vocabulary for token in block.tokens), "an id outside of the vocabulary")
            hold(block.learned is None or len(block.learned) == len(block.tokens), "a mask of another length")
    entries = json.loads(corpus.tokenizer_json())["model"]["vocab"]
    hold(len(entries) <= corpus.vocabulary, f"a tokenizer of {len(entries)} entries for {corpus.vocabulary}")


@check(
    "strategy",
    clause="`trainer_arguments` are keyword arguments of lightning.Trainer",
    where=f"{TRAINING}, StrategyFactory",
)
def strategy_gives_trainer_arguments(subject: Subject) -> None:
    """Those that choose devices and how they share the work."""
    arguments = subject.factory().trainer_arguments()
    hold(set(arguments) <= ARGUMENTS, f"other arguments: {', '.join(sorted(set(arguments) - ARGUMENTS))}")


@check(
    "strategy",
    clause="`parallelize` renames no parameter, changes no shape, and leaves every initial weight as it is",
    where=f"{TRAINING}, StrategyFactory: `parallelize`",
)
def sharded_weights_are_the_whole_models(subject: Subject) -> None:
    """The kit's model over one process: built on meta, sharded, then drawn, beside one that is whole."""
    factory = subject.factory()
    spare(type(factory).parallelize is not StrategyFactory.parallelize, "it shards no weights")
    spare(not dist.is_initialized(), "this process is already part of a process group")
    whole = state(subject.model())
    sharded = subject.model(meta=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        factory.parallelize(sharded, init_device_mesh("cpu", (1,)))
        initialise(sharded.to_empty(device="cpu"), 0)
        found = sharded.state_dict()
        weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    finally:
        dist.destroy_process_group()
    hold(any(isinstance(value, DTensor) for value in found.values()), "no weight was sharded")
    hold(list(weights) == list(whole), f"renamed: {', '.join(sorted(set(weights) ^ set(whole)))}")
    reshaped = [name for name, value in weights.items() if value.shape != whole[name].shape]
    hold(not reshaped, f"other shapes: {', '.join(reshaped)}")
    different = [name for name, value in weights.items() if not torch.equal(value, whole[name])]
    hold(not different, f"other initial weights: {', '.join(different)}")


@check("callback", "logger", clause="`make` gives Lightning's own kind of object", where=TRAINING)
def lightning_objects_are_made(subject: Subject) -> None:
    """In a folder of its own."""
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    more: dict[str, Any] = {"resumed_at": None} if subject.entry.slot == "logger" else {}
    with tempfile.TemporaryDirectory() as folder:
        made = subject.factory().make(Path(folder), **more)
        kind = Logger if subject.entry.slot == "logger" else Callback
        hold(isinstance(made, kind), f"made a {type(made).__name__}")
