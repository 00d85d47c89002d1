"""Seconds of a stage's forward and backward for one micro-batch, from its work and a cluster's measured speeds.

products   FLOPs / (peak x efficiency), slower at small sizes: 1 + shape (1/inputs + 1/outputs + 1/rows)
attention  causal FLOPs / (peak x efficiency)
passes     everything else that reads and writes memory: bytes of activations x passes / bandwidth
exchange   bytes of tokens between and inside nodes / speed of the links, whichever takes longer
"""

from dataclasses import dataclass, fields, replace
from math import gcd

from core.analysis.exchange import Choice, CopyBytes, LayerExchange
from core.cluster.cluster_file import Cluster
from core.cluster.work import SELECTIVE, Product, Work

FORWARD_SHARE = 1 / 3
"""The part of all passes over memory that a forward makes."""

FP8_BYTES = 4
"""Bytes that are moved to quantise an element: two read, one written by rows and one by columns."""

CAST_BYTES = 6
"""Bytes that are moved to cast a weight: four read, two written."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one stage and one micro-batch, by part.

    Args:
        products: matrix products.
        attention: scores and weighted sums.
        passes: passes over memory.
        exchange: tokens between expert ranks.
        tensor: sums between tensor ranks.
    """

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0
    tensor: float = 0.0

    def slower(self, factor: float) -> "Seconds":
        """The same with what the GPU computes taking `factor` times as long."""
        return replace(
            self,
            products=self.products * factor,
            attention=self.attention * factor,
            passes=self.passes * factor,
        )

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def compute(self) -> float:
        """What the GPU itself computes."""
        return self.products + self.attention + self.passes

    @property
    def alone(self) -> float:
        """All parts, one after the other."""
        return self.compute + self.exchange + self.tensor


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a stage for one micro-batch.

    Args:
        forward: those of the forward.
        inputs: those of the backward but for the gradients of weights, with what is computed again.
        weights: those of the gradients of weights.
    """

    forward: Seconds
    inputs: Seconds
    weights: Seconds

    @property
    def backward(self) -> Seconds:
        """A whole backward."""
        return self.inputs + self.weights


class CostModel:
    """Turns work into seconds.

    Args:
        cluster: devices, links, efficiencies and the layout.
        choices: how each layer's tokens choose their experts.
        length: tokens of a sequence.
    """

    def __init__(self, cluster: Cluster, choices: dict[str, Choice], length: int) -> None:
        layout = cluster.layout
        self.cluster = cluster
        self.choices = choices
        self.tokens = layout.micro_batch * length / layout.strategy.tensor
        self.fp8 = layout.precision == "fp8"
        self.bandwidth = cluster.device.bandwidth * cluster.efficiencies.memory
        self._seconds: dict[Product, float] = {}

    def stage(self, work: Work) -> StageSeconds:
        """The seconds of a stage with so much work."""
        layout = self.cluster.layout
        products = sum(map(self.product_seconds, work.products))
        exchange = self.exchange_seconds(work)
        tensor = self.tensor_seconds(work)
        device, known = self.cluster.device, self.cluster.efficiencies
        flops = work.attention * self.tokens
        attention = flops / (device.bf16 * known.attention_forward)
        moved = work.bytes_none * known.passes + 4 * work.logits * known.logits
        forward_bytes = moved * FORWARD_SHARE
        backward_bytes = moved - forward_bytes
        quantised = self._quantised(work)
        forward = Seconds(
            products,
            attention,
            self._pass(forward_bytes + quantised[0]) + self._casts(work),
            exchange,
            tensor,
        )
        inputs = Seconds(
            products,
            2 * flops / (device.bf16 * known.attention_backward),
            self._pass(backward_bytes + quantised[1]),
            exchange,
            tensor,
        )
        if layout.recompute == "full":
            inputs += forward
        elif layout.recompute == "selective":
            again = sum(self.product_seconds(p) for p in work.products if p.role in SELECTIVE)
            saved = work.bytes_none - work.bytes_selective
            inputs += Seconds(again, passes=self._pass(saved * known.passes * FORWARD_SHARE))
        waiting = 1 / known.busy
        return StageSeconds(
            forward.slower(waiting), inputs.slower(waiting), Seconds(products).slower(waiting)
        )

    def product_seconds(self, product: Product) -> float:
        """Seconds of one forward of a product, or of either of its gradients."""
        if product not in self._seconds:
            self._seconds[product] = self._product_seconds(product)
        return self._seconds[product]

    def _product_seconds(self, product: Product) -> float:
        device, known = self.cluster.device, self.cluster.efficiencies
        flops = product.flops * self.tokens
        if product.is_router:
            return flops / (device.fp32 * known.fp32)
        rows = self.tokens
        best = known.dense
        if product.groups:
            best = known.grouped
            rows *= product.top_k * self._expert_ranks() / product.groups
            flops *= self.cluster.layout.imbalance
        small = 1 / product.inputs + 1 / product.outputs + 1 / rows
        rate = min(known.product, best / (1 + known.shape * small)) * device.bf16
        if self.fp8 and product.can_be_fp8:
            rate *= known.fp8
        return flops / rate

    def exchange_seconds(self, work: Work) -> float:
        """Seconds of one exchange, tokens out and results back, in all of a stage's layers with experts."""
        ranks = self._expert_ranks()
        if ranks == 1:
            return 0.0
        links, known = self.cluster.links, self.cluster.efficiencies
        per_node = gcd(links.gpus_per_node, ranks)
        copy = CopyBytes.of(work.dim)
        size = copy.out + copy.back if self.fp8 else 4 * work.dim
        seconds = 0.0
        for path in work.expert_layers:
            layer = LayerExchange.of(self.choices[path], ranks, per_node)
            inside = layer.copies_inside * size / (links.inside * known.inside)
            between = layer.copies_between * size / (links.between * known.between)
            seconds += max(inside, between)
        return seconds * self.tokens * self.cluster.layout.imbalance

    def tensor_seconds(self, work: Work) -> float:
        """Seconds in which tensor ranks gather and sum their parts: two of each in every block, inside a node."""
        ranks = self.cluster.layout.strategy.tensor
        if ranks == 1:
            return 0.0
        blocks = sum(p.role == "attention.output" for p in work.products)
        moved = 4 * blocks * work.dim * 2 * self.tokens * (ranks - 1)
        return moved / (self.cluster.links.inside * self.cluster.efficiencies.inside)

    def pair(self, forward: StageSeconds, backward: StageSeconds) -> float:
        """Seconds of a forward beside another micro-batch's backward, with their exchanges beside both."""
        layout = self.cluster.layout
        both = forward.forward + backward.backward
        if not layout.overlap or both.exchange == 0:
            return both.alone
        total = self.cluster.device.multiprocessors
        slower = total / (total - layout.communication_multiprocessors)
        computed = (both.products + both.attention) * slower + both.passes + both.tensor
        return max(computed, both.exchange)

    def _expert_ranks(self) -> int:
        return self.cluster.layout.strategy.inner.expert_ranks

    def _pass(self, bytes_per_token: float) -> float:
        return bytes_per_token * self.tokens / self.bandwidth

    def _casts(self, work: Work) -> float:
        """Seconds in which weights are cast for one micro-batch."""
        if self.cluster.layout.cast_weights != "micro_batch":
            return 0.0
        weights = 0.0
        for product in work.products:
            if not product.is_router:
                share = self._expert_ranks() if product.groups else 1
                weights += product.weights / share
        return weights * CAST_BYTES / self.bandwidth

    def _quantised(self, work: Work) -> tuple[float, float]:
        """Bytes per token that quantising moves in the forward (inputs) and in the backward (gradients)."""
        if not self.fp8:
            return 0.0, 0.0
        inputs = 0
        outputs = 0
        for product in work.products:
            if product.can_be_fp8:
                inputs += product.inputs * product.top_k
                outputs += product.outputs * product.top_k
        return FP8_BYTES * float(inputs), FP8_BYTES * float(outputs)
