"""Reads a cluster file: devices, links, efficiencies and the layout of a training over them.

No torch is imported, so that a mistake in the file is reported at once.
"""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from core.cluster.schedules import SCHEDULES
from core.contracts.errors import UserError, nearest
from core.storage.documents import read_yaml

SHIPPED = Path(__file__).parent / "files"
"""The cluster files that come with the package."""

MOST_GPUS = 1_000_000
"""The largest cluster."""

RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp8")
INNER = ("single", "ddp", "zero1", "fsdp", "expert_parallel")
CASTS = ("micro_batch", "step")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU.

    Args:
        name: what it is called.
        bf16, fp8, fp32: peaks of dense products, in FLOPs per second.
        bandwidth: bytes per second between the GPU and its memory, nominal.
        memory: bytes.
        multiprocessors: how many it has.
    """

    name: str
    bf16: float
    fp8: float
    fp32: float
    bandwidth: float
    memory: float
    multiprocessors: int = 132


@dataclass(frozen=True, kw_only=True)
class Links:
    """How GPUs are connected.

    Args:
        gpus_per_node: GPUs of a node.
        inside: bytes per second that a GPU can send to others of its node, nominal, one direction.
        between: bytes per second that a GPU can send to other nodes, nominal, one direction.
    """

    gpus_per_node: int
    inside: float
    between: float


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """What of its nominal speed a part of the work reaches; docs/cluster.md says how each was measured.

    All but those of links are from `records/gpu` (one H100): steps of two models of unlike widths, by kinds of kernels.

    Args:
        product: the most that a dense product reaches, of the bf16 peak: 775 of 989 TFLOP/s at 8192^3.
        dense: what dense products would reach at infinite sizes, of the bf16 peak.
        grouped: the same for grouped products.
        shape: sizes by which products of finite sizes are slower: rate / (1 + shape (1/inputs + 1/outputs + 1/rows)).
        fp8: rate of an FP8 product with 1x128 scales over that of the bf16 product.
        fp32: products of routers, of the fp32 peak.
        attention_forward, attention_backward: parts of the bf16 peak, by causal FLOPs (backward twice the forward's).
        memory: copies, of the nominal bandwidth.
        passes: how often a kept byte of activations is read or written in forward and backward.
        logits: the same for a byte of fp32 logits.
        optimizer: the optimizer's and the norm's kernels, of the nominal bandwidth.
        busy: the part of the time in which a GPU computes and does not wait for its host.
        inside, between: parts of the nominal speeds of the links (DeepEP, published).
    """

    product: float = 0.784
    dense: float = 0.861
    grouped: float = 0.673
    shape: float = 143.0
    fp8: float = 1.47
    fp32: float = 0.766
    attention_forward: float = 0.571
    attention_backward: float = 0.302
    memory: float = 0.896
    passes: float = 4.7
    logits: float = 2.1
    optimizer: float = 0.55
    busy: float = 0.961
    inside: float = 0.78
    between: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The strategy inside a pipeline stage.

    Args:
        name: `ddp` sums whole gradients, `zero1` divides the optimizer, `fsdp` and `expert_parallel` all states.
        ranks: ranks that read different sequences.
        expert_ranks: ranks, among those, that share the routed experts.
    """

    name: str = "single"
    ranks: int = 1
    expert_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The strategy as a recipe would name it.

    Args:
        name: always `pipeline`; with `ranks: 1` there is none.
        ranks: pipeline ranks.
        schedule: one of the plans.
        chunks: stages of a rank, for interleaved 1F1B.
        tensor: ranks that share every product; each has its share of a micro-batch's tokens.
        inner: the strategy inside a stage.
    """

    name: str = "pipeline"
    ranks: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    tensor: int = 1
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a recipe is trained on the cluster.

    Args:
        strategy: the ranks.
        micro_batch: sequences that a data rank takes at once.
        micro_batches: micro-batches of a step on each data rank; null: the recipe's batch decides.
        recompute: what the backward computes again: none, selective or full.
        precision: format of the large products: bf16 or fp8.
        overlap: whether the exchange of tokens and the sums of gradients run beside computation where the plan has
            something beside them.
        communication_multiprocessors: multiprocessors that an overlapped exchange takes from the products.
        cast_weights: when weights are cast to the products' format: each `micro_batch`, or once a `step`.
        imbalance: the load of the fullest expert rank over the mean.
    """

    strategy: Strategy = field(default_factory=Strategy)
    micro_batch: int = 1
    micro_batches: int | None = None
    recompute: str = "none"
    precision: str = "bf16"
    overlap: bool = False
    communication_multiprocessors: int = 20
    cast_weights: str = "step"
    imbalance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster and the layout on it.

    Args:
        device: its GPUs.
        links: their connections.
        layout: the training.
        efficiencies: the measured ones unless the file says otherwise.
        source: the file.
    """

    device: Device
    links: Links
    layout: Layout = field(default_factory=Layout)
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    source: str = ""

    @property
    def gpus(self) -> int:
        """GPUs of the layout."""
        strategy = self.layout.strategy
        return strategy.ranks * strategy.inner.ranks * strategy.tensor


CHOICES = {
    "layout.recompute": RECOMPUTE,
    "layout.precision": PRECISIONS,
    "layout.cast_weights": CASTS,
    "layout.strategy.name": ("pipeline",),
    "layout.strategy.schedule": tuple(SCHEDULES),
    "layout.strategy.inner.name": INNER,
}
"""The allowed words of every key that has some."""


def read_cluster(path: str) -> Cluster:
    """Reads a cluster file, or a shipped one by its name.

    Raises:
        UserError: the file is not there or a value is not allowed; the sentence names file, key, value and what is.
    """
    file = Path(path)
    shipped = {one.stem: one for one in SHIPPED.glob("*.yaml")}
    if not file.exists():
        if path not in shipped:
            known = f"a file, or one of {', '.join(sorted(shipped))}"
            raise UserError(f"--cluster {path}: no such file; give {known}")
        file = shipped[path]
    try:
        found = yaml.safe_load(read_yaml(file))
    except yaml.YAMLError as cause:
        place = getattr(cause, "problem_mark", None)
        line = "" if place is None else f" in line {place.line + 1}"
        raise UserError(f"{file}: is no YAML{line}") from cause
    cluster = _read(Cluster, found, "", file)
    assert isinstance(cluster, Cluster)
    _check(cluster, file)
    return cluster


def _read(kind: type, found: Any, path: str, file: Path) -> Any:
    """The dataclass of a section, its fields checked one by one."""
    if not isinstance(found, dict):
        where = path or "the file"
        raise UserError(f"{file}: {where} = {found!r} must be a mapping of keys to values")
    known = {f.name: f for f in fields(kind) if f.name != "source"}
    types = get_type_hints(kind)
    values: dict[str, Any] = {"source": str(file)} if kind is Cluster else {}
    for key, value in found.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise UserError(f"{file}: unknown key {at}; {nearest(str(key), known)}")
        values[key] = _value(types[key], value, at, file)
    for name, one in known.items():
        if name not in values and one.default is MISSING and one.default_factory is MISSING:
            at = f"{path}.{name}" if path else name
            raise UserError(f"{file}: {at} is missing")
    return kind(**values)


def _value(kind: Any, value: Any, at: str, file: Path) -> Any:
    """A value of a key, converted to its type and within its range."""

    def refuse(allowed: str) -> UserError:
        return UserError(f"{file}: {at} = {value!r} must be {allowed}")

    if is_dataclass(kind):
        assert isinstance(kind, type)
        return _read(kind, value, at, file)
    if kind is bool:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if kind is str:
        allowed = CHOICES.get(at)
        if allowed is not None and value not in allowed:
            raise refuse(f"one of {', '.join(allowed)}")
        if not isinstance(value, str) or not value:
            raise refuse("a text")
        return value
    if kind is float:
        number = _number(value)
        if number is None or number <= 0:
            raise refuse("a finite number above 0")
        return number
    if value is None and kind is not int:
        return None
    least = 0 if at.endswith("communication_multiprocessors") else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refuse(f"a whole number of at least {least}")
    return value


def _number(value: Any) -> float | None:
    """A finite number; YAML reads 989e12 as a text."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


def _check(cluster: Cluster, file: Path) -> None:
    """Raises `UserError` for values that do not fit each other."""
    layout = cluster.layout
    strategy, inner = layout.strategy, layout.strategy.inner
    at = f"{file}: layout.strategy"
    if inner.ranks % inner.expert_ranks:
        raise UserError(
            f"{at}.inner.expert_ranks = {inner.expert_ranks} must divide ranks = {inner.ranks}"
        )
    if inner.name == "single" and inner.ranks > 1:
        raise UserError(
            f"{at}.inner.ranks = {inner.ranks} must be 1 for single: ddp, zero1, fsdp or expert_parallel have more"
        )
    if inner.name in ("single", "ddp", "fsdp") and inner.expert_ranks > 1:
        raise UserError(
            f"{at}.inner.expert_ranks = {inner.expert_ranks} must be 1 for {inner.name}: zero1 or expert_parallel "
            "have more"
        )
    if strategy.ranks == 1 and strategy.schedule != "1f1b":
        raise UserError(
            f"{at}.schedule = {strategy.schedule!r} must be left out with ranks = 1: there is no pipeline"
        )
    if strategy.chunks > 1 and strategy.schedule != "interleaved_1f1b":
        raise UserError(
            f"{at}.chunks = {strategy.chunks} must be 1 under schedule {strategy.schedule}: "
            "interleaved_1f1b alone has more"
        )
    if layout.communication_multiprocessors >= cluster.device.multiprocessors:
        raise UserError(
            f"{file}: layout.communication_multiprocessors = {layout.communication_multiprocessors} must be less "
            f"than device.multiprocessors = {cluster.device.multiprocessors}"
        )
    if cluster.gpus > MOST_GPUS:
        raise UserError(f"{at}: {cluster.gpus:,} GPUs must be at most {MOST_GPUS:,}")
    if layout.imbalance < 1:
        raise UserError(f"{file}: layout.imbalance = {layout.imbalance:g} must be at least 1")
