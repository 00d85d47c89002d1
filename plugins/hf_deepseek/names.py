"""Tensor names: those of the checkpoint (`model.layers.3.mlp.experts.7.gate_proj.weight`) mapped to rows of ours.

Our `gate_up` holds, for each expert in turn, the rows of the gate and then those of the up projection. Every other
tensor is the same matrix under another name, except where the rotated rows of a head are stored in halves
(`rope_interleave: false`: x0 ... x31 with x32 ... x63) and ours in pairs.
"""

from collections.abc import Collection, Iterator
from functools import lru_cache

from core.contracts.checkpoint_format import TensorMapping
from plugins.hf_deepseek.layout import HfLayout


def tensor_mappings(
    layout: HfLayout, names: Collection[str] | None, *, interleaved: bool, biased: bool
) -> Iterator[TensorMapping]:
    """Yields the mapping of every tensor of the checkpoint, in the order of its layers.

    Args:
        layout: the layout of our model.
        names: the tensors of the files; None for the usual layout, one tensor for each projection of an expert.
        interleaved: whether rotated rows are stored in pairs.
        biased: whether the architecture has a selection bias.
    """
    layers = _Layers(layout, names, interleaved=interleaved, biased=biased)
    table = (layout.vocabulary, layout.dim)
    yield TensorMapping("model.embed_tokens.weight", table, "embedding.weight")
    for layer in range(layout.layers):
        dense = layer < layout.dense
        yield from layers.block(f"model.layers.{layer}", f"blocks.{layer}", dense=dense)
    yield TensorMapping("model.norm.weight", (layout.dim,), "norm.weight")
    if not layout.tied:
        yield TensorMapping("lm_head.weight", table, "output.weight")
    elif names is not None and "lm_head.weight" in names:
        yield TensorMapping("lm_head.weight", table, "embedding.weight", copy=True, optional=True)
    for depth in range(layout.depths):
        theirs = f"model.layers.{layout.layers + depth}"
        yield from layers.module(theirs, f"heads.{layout.mtp}.depths.{depth}")


class _Layers:
    """Mappings of the tensors of one layer; `theirs` and `ours` are the prefixes of their names."""

    def __init__(
        self, layout: HfLayout, names: Collection[str] | None, *, interleaved: bool, biased: bool
    ) -> None:
        self.layout = layout
        self.interleaved = interleaved
        self.biased = biased
        self.names = frozenset(names or ())

    def module(self, theirs: str, ours: str) -> Iterator[TensorMapping]:
        """Yields a module of multi-token prediction, with its own copies of embedding and output, as released."""
        dim = self.layout.dim
        table = (self.layout.vocabulary, dim)
        embedding = "embedding.weight"
        output = embedding if self.layout.tied else "output.weight"
        copied = f"{theirs}.embed_tokens.weight"
        yield TensorMapping(copied, table, embedding, copy=True, optional=True)
        yield TensorMapping(f"{theirs}.enorm.weight", (dim,), f"{ours}.embedding_norm.weight")
        yield TensorMapping(f"{theirs}.hnorm.weight", (dim,), f"{ours}.hidden_norm.weight")
        yield TensorMapping(f"{theirs}.eh_proj.weight", (dim, 2 * dim), f"{ours}.projection.weight")
        yield from self.block(theirs, f"{ours}.block", dense=False)
        yield TensorMapping(f"{theirs}.shared_head.norm.weight", (dim,), f"{ours}.norm.weight")
        copied = f"{theirs}.shared_head.head.weight"
        yield TensorMapping(copied, table, output, copy=True, optional=True)

    def block(self, theirs: str, ours: str, *, dense: bool) -> Iterator[TensorMapping]:
        """Yields one layer: attention, feed-forward, and their norms."""
        dim = self.layout.dim
        norm = f"{theirs}.input_layernorm.weight"
        yield TensorMapping(norm, (dim,), f"{ours}.attention_norm.weight")
        yield from self.attention(f"{theirs}.self_attn", f"{ours}.attention")
        norm = f"{theirs}.post_attention_layernorm.weight"
        yield TensorMapping(norm, (dim,), f"{ours}.ffn_norm.weight")
        if dense:
            assert self.layout.hidden is not None
            yield from _swiglu(f"{theirs}.mlp", f"{ours}.ffn", dim, self.layout.hidden)
        else:
            yield from self.experts(f"{theirs}.mlp", f"{ours}.ffn")

    def attention(self, theirs: str, ours: str) -> Iterator[TensorMapping]:
        """Yields the matrices and norms of multi-head latent attention."""
        section = self.layout.attention
        dim = self.layout.dim
        heads = section["heads"]
        nope_dim = section["nope_dim"]
        rope_dim = section["rope_dim"]
        value_dim = section["value_dim"]
        kv_rank = section["kv_rank"]
        yield from self._queries(theirs, ours)
        down = f"{theirs}.kv_a_proj_with_mqa.weight"
        shape = (kv_rank + rope_dim, dim)
        order = self._order(1, kv_rank, rope_dim)
        yield TensorMapping(down, shape, f"{ours}.kv_down.weight", order=order, blocks=True)
        norm = f"{theirs}.kv_a_layernorm.weight"
        yield TensorMapping(norm, (kv_rank,), f"{ours}.kv_norm.weight")
        up = f"{theirs}.kv_b_proj.weight"
        shape = (heads * (nope_dim + value_dim), kv_rank)
        yield TensorMapping(up, shape, f"{ours}.kv_up.weight", blocks=True)
        output = f"{theirs}.o_proj.weight"
        shape = (dim, heads * value_dim)
        yield TensorMapping(output, shape, f"{ours}.output.weight", blocks=True)
        if "index_heads" in section:
            yield from self._indexer(f"{theirs}.indexer", f"{ours}.indexer")

    def _indexer(self, theirs: str, ours: str) -> Iterator[TensorMapping]:
        """Yields the matrices of the indexer of sparse attention, whose rotated rows are in halves on both sides."""
        section = self.layout.attention
        dim = self.layout.dim
        heads = section["index_heads"]
        width = section["index_dim"]
        queries = (heads * width, section["q_rank"])
        yield TensorMapping(f"{theirs}.wq_b.weight", queries, f"{ours}.q.weight", blocks=True)
        yield TensorMapping(f"{theirs}.wk.weight", (width, dim), f"{ours}.k.weight", blocks=True)
        yield TensorMapping(f"{theirs}.k_norm.weight", (width,), f"{ours}.k_norm.weight")
        yield TensorMapping(f"{theirs}.k_norm.bias", (width,), f"{ours}.k_norm.bias")
        weights = f"{theirs}.weights_proj.weight"
        yield TensorMapping(weights, (heads, dim), f"{ours}.weights.weight")

    def _queries(self, theirs: str, ours: str) -> Iterator[TensorMapping]:
        """Yields the projection of the queries, or the two around their latent."""
        section = self.layout.attention
        dim = self.layout.dim
        heads = section["heads"]
        rank = section["q_rank"]
        rows = heads * (section["nope_dim"] + section["rope_dim"])
        order = self._order(heads, section["nope_dim"], section["rope_dim"])
        if rank is None:
            whole = f"{theirs}.q_proj.weight"
            yield TensorMapping(whole, (rows, dim), f"{ours}.q.weight", order=order, blocks=True)
            return
        down = f"{theirs}.q_a_proj.weight"
        yield TensorMapping(down, (rank, dim), f"{ours}.q_down.weight", blocks=True)
        norm = f"{theirs}.q_a_layernorm.weight"
        yield TensorMapping(norm, (rank,), f"{ours}.q_norm.weight")
        up = f"{theirs}.q_b_proj.weight"
        yield TensorMapping(up, (rows, rank), f"{ours}.q_up.weight", order=order, blocks=True)

    def _order(self, heads: int, kept: int, rotated: int) -> tuple[int, ...] | None:
        """Returns the order of the rows; None if rotated rows are stored in pairs, as ours are."""
        if self.interleaved:
            return None
        return _pairs_from_halves(heads, kept, rotated)

    def experts(self, theirs: str, ours: str) -> Iterator[TensorMapping]:
        """Yields the router, its bias, the routed experts and the shared ones."""
        section = self.layout.experts
        assert section is not None
        dim = self.layout.dim
        count = section["experts"]
        hidden = section["expert_hidden"]
        gate = f"{theirs}.gate.weight"
        yield TensorMapping(gate, (count, dim), f"{ours}.router.centroids.weight")
        if self.biased:
            bias = self.layout.bias
            place = None if bias is None else f"{ours}.balance.{bias.index}.bias"
            bias_name = f"{theirs}.gate.e_score_correction_bias"
            yield TensorMapping(bias_name, (count,), place, exact=True)
        yield from self._routed(f"{theirs}.experts", f"{ours}.routed", count, hidden)
        theirs = f"{theirs}.shared_experts"
        if section["shared_experts"]:
            width = section["shared_experts"] * hidden
            yield from _swiglu(theirs, f"{ours}.shared", dim, width)
        else:
            yield TensorMapping(f"{theirs}.gate_proj.weight", (0, dim), None, optional=True)
            yield TensorMapping(f"{theirs}.up_proj.weight", (0, dim), None, optional=True)
            yield TensorMapping(f"{theirs}.down_proj.weight", (dim, 0), None, optional=True)

    def _routed(self, theirs: str, ours: str, count: int, hidden: int) -> Iterator[TensorMapping]:
        """Yields the routed experts: packed if the files hold them like that, otherwise one by one."""
        dim = self.layout.dim
        packed = f"{theirs}.gate_up_proj"
        if packed in self.names:
            yield TensorMapping(packed, (count, 2 * hidden, dim), f"{ours}.gate_up.weight")
            down = f"{theirs}.down_proj"
            yield TensorMapping(down, (count, dim, hidden), f"{ours}.down.weight")
            return
        for expert in range(count):
            yield from _swiglu(f"{theirs}.{expert}", ours, dim, hidden, expert)


def _swiglu(
    theirs: str, ours: str, dim: int, hidden: int, expert: int = 0
) -> Iterator[TensorMapping]:
    """Yields the three matrices of a SwiGLU, which may be one expert of many."""
    gate_up = f"{ours}.gate_up.weight"
    first = 2 * hidden * expert
    wide = (hidden, dim)
    yield TensorMapping(f"{theirs}.gate_proj.weight", wide, gate_up, first, blocks=True)
    yield TensorMapping(f"{theirs}.up_proj.weight", wide, gate_up, first + hidden, blocks=True)
    down = f"{theirs}.down_proj.weight"
    yield TensorMapping(down, (dim, hidden), f"{ours}.down.weight", dim * expert, blocks=True)


@lru_cache(maxsize=8)
def _pairs_from_halves(heads: int, kept: int, rotated: int) -> tuple[int, ...]:
    """Returns the checkpoint's row for each of our rows, if its rotated rows are stored in halves.

    Args:
        heads: number of heads.
        kept: rows of a head that are not rotated, which come first.
        rotated: rows of a head that are rotated.
    """
    half = rotated // 2
    one_head = list(range(kept))
    for i in range(half):
        one_head += [kept + i, kept + half + i]
    order: list[int] = []
    for head in range(heads):
        start = head * (kept + rotated)
        order += [start + row for row in one_head]
    return tuple(order)
