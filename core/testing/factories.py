"""Checks of corpora, and of the components that make objects for Lightning and torch."""

import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from core.contracts.corpus import MixtureCorpus, Split, TokenBlock, TokenCorpus
from core.contracts.errors import UserError
from core.contracts.schedule import Progress
from core.contracts.training import (
    NamedParameter,
    OptimizerFactory,
    ParameterKind,
    WeightAverage,
)
from core.model.initialise import initialise, leave_meta
from core.model.parameters import check_groups, named_parameters
from core.numerics.part_exchange import local_tensor
from core.testing.clauses import check, require, skip_unless
from core.testing.forked_ranks import on_ranks
from core.testing.subject import Subject, state
from core.training.weight_shards import weight_shards

TRAINING = "core/contracts/training.py"
STRATEGY = "core/contracts/strategy.py, StrategyFactory"
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


AVERAGED_STEPS = 20
"""Steps in which an average must have been updated; the last one is skipped."""


@check(
    "optimizer",
    clause="`make` returns torch optimizers that hold each weight in exactly one group",
    where=f"{TRAINING}, OptimizerFactory",
)
def optimizer_is_torchs(subject: Subject) -> None:
    """Takes a step, which must move every parameter, loads the state again, and reads learning rates of a run."""
    factory = subject.factory()
    named = _weights_with_gradients(torch.float32)
    made = factory.make(named)
    optimizers = made if isinstance(made, list) else [made]
    require(all(isinstance(one, torch.optim.Optimizer) for one in optimizers), f"made {made!r}")
    try:
        check_groups(optimizers, named)
    except ValueError as error:
        require(False, str(error))
    rates = [factory.learning_rate(Progress(step, step, 100, 100)) for step in (1, 50, 100)]
    require(all(0 <= rate < float("inf") for rate in rates), f"learning rates {rates}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for weight in named:
        require(bool((weight.parameter != 1).all()), "a parameter did not move")


@check(
    "optimizer",
    clause="`state_bytes_of` counts at least the bytes of every state that has the form of its weight",
    where=f"{TRAINING}, OptimizerFactory: `state_bytes_of`",
)
def optimizer_states_are_counted(subject: Subject) -> None:
    """Takes a step of a weight of each kind, and compares the bytes of what is kept."""
    factory = subject.factory()
    named = _weights_with_gradients(torch.float32)
    optimizers = _stepped(factory, named)
    for weight in named:
        states = [optimizer.state.get(weight.parameter, {}) for optimizer in optimizers]
        kept = [v for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim]
        held = sum(tensor.nbytes for tensor in kept)
        counted = factory.state_bytes_of(weight)
        require(held <= counted, f"{weight.kind}: {held} bytes are kept, and {counted} counted")


class _Meeting:
    """Two threads that gather the rows of their matrices, as two ranks do.

    Args:
        rank: the number of this thread.
        axis: the axis along which a tensor is divided.
        barrier, parts: what both threads share.
    """

    def __init__(
        self, rank: int, axis: int, barrier: threading.Barrier, parts: list[Tensor]
    ) -> None:
        self.rank = rank
        self.axis = axis
        self.barrier = barrier
        self.parts = parts

    def gather(self, part: Tensor) -> Tensor:
        """Waits for the other thread's part."""
        self.parts[self.rank] = part
        self.barrier.wait()
        whole = torch.cat(self.parts, dim=self.axis)
        self.barrier.wait()
        return whole

    def shard_of(self, whole: Tensor) -> Tensor:
        """This thread's part."""
        return whole.chunk(2, dim=self.axis)[self.rank]


@check(
    "optimizer",
    clause="an optimizer that gathers matrices updates the parts of divided ones as it updates whole ones",
    where=f"{TRAINING}, OptimizerFactory: `gathers_matrices`, MatrixShard",
)
def divided_matrices_are_updated_as_whole(subject: Subject) -> None:
    """Takes two steps of whole weights, and of their halves in two threads that gather from each other."""
    factory = subject.factory()
    skip_unless(factory.gathers_matrices, "it gathers no matrices")
    whole = _weights_with_gradients(torch.float64)
    axes = {weight.name: max(0, weight.parameter.ndim - 2) for weight in whole}
    barrier = threading.Barrier(2, timeout=60)
    parts: list[Tensor] = [torch.empty(0)] * 2

    def half(weight: NamedParameter, rank: int) -> NamedParameter:
        axis = axes[weight.name]
        meeting = _Meeting(rank, axis, barrier, parts) if weight.parameter.ndim > 1 else None
        own = torch.nn.Parameter(weight.parameter.detach().chunk(2, dim=axis)[rank].clone())
        assert weight.parameter.grad is not None
        own.grad = weight.parameter.grad.chunk(2, dim=axis)[rank].clone()
        return NamedParameter(weight.name, own, weight.role, weight.kind, meeting)

    halves = [[half(weight, rank) for weight in whole] for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(_stepped, subject.factory(), own, steps=2) for own in halves]
        for future in work:
            future.result()
    _stepped(factory, whole, steps=2)
    for weight, one, other in zip(whole, *halves, strict=True):
        pair = [one.parameter.detach(), other.parameter.detach()]
        found = torch.cat(pair, dim=axes[weight.name])
        far = float((found - weight.parameter.detach()).abs().max())
        require(far < 1e-10, f"{weight.name}: halves differ from the whole by {far:.1e}")


@check(
    "optimizer",
    clause="an optimizer that needs no whole matrices updates parts of a weight as it updates the whole",
    where=f"{TRAINING}, OptimizerFactory: `needs_whole_of`",
)
def parts_are_updated_as_the_whole(subject: Subject) -> None:
    """Takes two steps of whole weights, and of their halves along each axis."""
    factory = subject.factory()
    gathers = factory.needs_whole_matrices and factory.gathers_matrices
    skip_unless(not gathers, "it gathers matrices")
    skip_unless(not factory.needs_whole_of(factory.config), "it needs whole matrices")
    whole = _weights_with_gradients(torch.float64)
    halves: dict[tuple[str, int], list[NamedParameter]] = {}
    for weight in whole:
        assert weight.parameter.grad is not None
        for axis in range(weight.parameter.ndim):
            pairs = zip(
                weight.parameter.detach().chunk(2, dim=axis),
                weight.parameter.grad.chunk(2, dim=axis),
                strict=True,
            )
            for values, gradient in pairs:
                own = torch.nn.Parameter(values.clone())
                own.grad = gradient.clone()
                part = NamedParameter(weight.name, own, weight.role, weight.kind)
                halves.setdefault((weight.name, axis), []).append(part)
    _stepped(factory, whole, steps=2)
    _stepped(subject.factory(), [part for parts in halves.values() for part in parts], steps=2)
    for weight in whole:
        for axis in range(weight.parameter.ndim):
            parts = [part.parameter.detach() for part in halves[weight.name, axis]]
            found = torch.cat(parts, dim=axis)
            far = float((found - weight.parameter.detach()).abs().max())
            require(far < 1e-10, f"{weight.name}: parts differ from the whole by {far:.1e}")


def _weights_with_gradients(dtype: torch.dtype) -> list[NamedParameter]:
    """A weight of each kind, with a gradient."""
    draw = torch.Generator().manual_seed(0)
    named = []
    for kind, (role, shape) in WEIGHTS.items():
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        parameter.grad = torch.rand(shape, generator=draw, dtype=dtype) + 0.5
        named.append(NamedParameter(f"{kind}.weight", parameter, role, kind))
    return named


def _stepped(
    factory: OptimizerFactory, named: list[NamedParameter], *, steps: int = 1
) -> list[torch.optim.Optimizer]:
    """The optimizers of some weights after a few steps."""
    made = factory.make(named)
    optimizers = made if isinstance(made, list) else [made]
    for _ in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * group.get("lr_scale", 1.0)
            optimizer.step()
    return optimizers


@check(
    "corpus",
    clause="documents have unique names and UTF-8 text; what cannot be read is a UserError",
    where=CORPUS,
)
def documents_are_named_text(subject: Subject) -> None:
    """Reads the first hundred documents twice; both readings must be the same."""
    of_tokens = isinstance(subject.factory(), TokenCorpus)
    skip_unless(not of_tokens, "a corpus of tokens has no documents")
    is_mixture = isinstance(subject.factory(), MixtureCorpus)
    skip_unless(not is_mixture, "the parts of a mixture have the documents")
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


class _ByteTokenizer:
    """A tokenizer of bytes, for corpora that are read with one."""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> TokenBlock:
        """Writes the messages as JSON, of which the assistant's are learned."""
        tokens: list[int] = []
        learned: list[bool] = []
        for message in messages:
            text = json.dumps(message, default=str).encode()
            tokens += text
            learned += [message.get("role") == "assistant"] * len(text)
        return TokenBlock(tokens, learned=learned)


@check(
    "corpus",
    clause="token blocks come in the same order each time, with ids of the vocabulary and masks of their length",
    where="core/contracts/corpus.py, TokenCorpus",
)
def token_blocks_are_stable(subject: Subject) -> None:
    """Reads the first hundred blocks of each split twice, and compares the tokenizer with the vocabulary."""
    corpus = subject.factory()
    skip_unless(isinstance(corpus, TokenCorpus), "a corpus of text")
    if corpus.needs_tokenizer:
        corpus = corpus.with_tokenizer(_ByteTokenizer())
    assert isinstance(corpus, TokenCorpus)
    for split in get_args(Split):
        try:
            first = list(islice(corpus.blocks(split), 100))
            again = list(islice(corpus.blocks(split), 100))
        except UserError as error:
            skip_unless(False, f"the example's tokens are not here: {error}")
            return
        require(
            list(map(_block_content, first)) == list(map(_block_content, again)),
            "a second reading gives other blocks",
        )
        for block in first:
            require(len(block.tokens) > 0, "an empty block")
            known = min(block.tokens) >= 0
            if corpus.vocabulary is not None:
                known = known and max(block.tokens) < corpus.vocabulary
            require(known, "an id outside of the vocabulary")
            if block.learned is not None:
                require(len(block.learned) == len(block.tokens), "a mask of another length")
    tokenizer = corpus.tokenizer_json()
    if tokenizer is None or corpus.vocabulary is None:
        return
    entries = len(json.loads(tokenizer)["model"]["vocab"])
    found = f"a tokenizer of {entries} entries for {corpus.vocabulary}"
    require(entries <= corpus.vocabulary, found)


def _block_content(block: TokenBlock) -> tuple[object, ...]:
    """What a block holds, for comparisons; tokens and masks may be arrays."""
    learned = None if block.learned is None else list(block.learned)
    return list(block.tokens), learned, block.source, block.text_bytes


@check(
    "strategy",
    clause="`trainer_arguments` are keyword arguments of lightning.Trainer",
    where=STRATEGY,
)
def strategy_gives_trainer_arguments(subject: Subject) -> None:
    """Allows only the arguments that choose devices and how they share the work."""
    others = sorted(set(subject.factory().trainer_arguments()) - ARGUMENTS)
    require(not others, f"other arguments: {', '.join(others)}")


@check(
    "strategy",
    clause="`parallelize` renames no parameter, and leaves the shape and initial values of every weight as they are",
    where=f"{STRATEGY}: `parallelize`",
)
def divided_weights_are_the_whole_models(subject: Subject) -> None:
    """Divides the weights of the kit's model over forked ranks, draws them, and compares them with a whole model's."""
    factory = subject.factory()
    skip_unless(factory.shards, "it divides no weights")
    skip_unless(not dist.is_initialized(), "this process is already part of a process group")
    whole = state(subject.model())
    dispatcher = factory.replaced_dispatcher()

    def gathered(rank: int) -> tuple[list[str], dict[str, Tensor]]:
        mesh = factory.make_mesh("cpu")
        model = subject.model(meta=True, dispatcher=dispatcher)
        factory.parallelize(model, mesh)
        leave_meta(model, "cpu")
        initialise(model, 0)
        parts = dict(weight_shards(model, factory.expert_group(mesh)))
        divided = [name for name, part in parts.items() if part.is_sharded]
        weights = {}
        for name, value in model.state_dict().items():
            if name in model.absent:
                continue
            weights[name] = parts[name].gather(local_tensor(value)) if name in divided else value
        return divided, weights

    with tempfile.TemporaryDirectory() as folder:
        ranks = factory.ranks_of(factory.config)
        by_rank = on_ranks(gathered, Path(folder), world=ranks)
    divided, weights = by_rank[0]
    require(divided or len(weights) < len(whole), "no weight is divided")
    held = {name for _, own in by_rank for name in own}
    renamed = ", ".join(sorted(held ^ set(whole)))
    require(not renamed, f"renamed: {renamed}")
    for _, own in by_rank:
        require(list(own) == [name for name in whole if name in own], "another order of weights")
        reshaped = [name for name, value in own.items() if value.shape != whole[name].shape]
        require(not reshaped, f"other shapes: {', '.join(reshaped)}")
        different = [name for name, value in own.items() if not torch.equal(value, whole[name])]
        require(not different, f"other initial weights: {', '.join(different)}")


@check(
    "callback",
    clause="averages follow the weights after steps that were not skipped, and change neither them nor random numbers",
    where=f"{TRAINING}, WeightAverage",
)
def averages_follow_the_weights(subject: Subject) -> None:
    """Moves the weights of the kit's model for some steps, of which one is skipped, and looks at the averages."""
    factory = subject.factory()
    skip_unless(factory.average is not None, "it averages no weights")
    with tempfile.TemporaryDirectory() as folder:
        callback: Any = factory.make(Path(folder))
    average: Any = getattr(callback, "average", None)
    require(isinstance(average, WeightAverage), f"its attribute `average` is {average!r}")
    require(average.name == factory.average, f"named {average.name!r}, not {factory.average!r}")
    require(not average.updates and not average.weights, "it has averages before the first step")
    named = named_parameters(subject.model())
    before = torch.get_rng_state()
    moved: list[Tensor] = []
    updates: list[int] = []
    for step in range(1, AVERAGED_STEPS + 1):
        with torch.no_grad():
            for one in named:
                one.parameter.add_(0.01)
        moved = [one.parameter.detach().clone() for one in named]
        skipped = int(step == AVERAGED_STEPS)
        module = SimpleNamespace(
            local_parameters=SimpleNamespace(named=named),
            windows_done=step,
            skipped_in_a_row=skipped,
        )
        callback.on_train_batch_end(SimpleNamespace(), module, None, None, step - 1)
        updates.append(average.updates)
    require(updates[-2] > 0, f"no update in {AVERAGED_STEPS - 1} steps")
    require(updates[-1] == updates[-2], "a skipped step was an update")
    same = all(torch.equal(one.parameter, now) for one, now in zip(named, moved, strict=True))
    require(same, "the weights changed")
    require(torch.equal(torch.get_rng_state(), before), "random numbers were drawn")
    require(list(average.weights) == [one.name for one in named], "other names than the weights'")
    for one in named:
        kept = average.weights[one.name]
        require(kept.shape == one.parameter.shape, f"{one.name} has the shape {list(kept.shape)}")
        behind = bool(torch.isfinite(kept).all()) and bool((kept <= one.parameter).all())
        require(behind, f"the average of {one.name} is ahead of a weight that only grew")
        require(factory.average_bytes(one.parameter) >= 0, "negative bytes")


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
