"""Tensor names: theirs (`model.layers.3.mlp.experts.7.gate_proj.weight`) to rows of ours.

Rows: our `gate_up` holds the gate's rows, then the up projection's, for each expert one after the other. Everything
else is the same matrix under another name, except where the rotated rows of a head stand in halves
(`rope_interleave: false`: x0 ... x31 with x32 ... x63) and ours in pairs.
"""

from collections.abc import Collection, Iterator
from functools import lru_cache

from core.contracts.checkpoint_format import Piece
from plugins.hf_deepseek.layout import Layout


def pieces(layout: Layout, names: Collection[str] | None, *, interleaved: bool, biased: bool) -> Iterator[Piece]:
    """Every tensor of the checkpoint, in the order of its layers.

    Args:
        layout: of our model.
        names: of the files, None for the usual layout: one tensor for each expert's projection.
        interleaved: whether rotated rows stand in pairs.
        biased: whether the architecture has a selection bias.
    """
    namer = _Namer(layout, names, interleaved=interleaved, biased=biased)
    shared = (layout.vocabulary, layout.dim)
    yield Piece("model.embed_tokens.weight", shared, "embedding.weight")
    for layer in range(layout.layers):
        yield from namer.block(f"model.layers.{layer}", f"blocks.{layer}", layer < layout.dense)
    yield Piece("model.norm.weight", (layout.dim,), "norm.weight")
    if not layout.tied:
        yield Piece("lm_head.weight", shared, "output.weight")
    elif names is not None and "lm_head.weight" in names:
        yield Piece("lm_head.weight", shared, "embedding.weight", copy=True, optional=True)
    for depth in range(layout.depths):
        yield from namer.module(f"model.layers.{layout.layers + depth}", f"heads.{layout.mtp}.depths.{depth}")


class _Namer:
    def __init__(self, layout: Layout, names: Collection[str] | None, *, interleaved: bool, biased: bool) -> None:
        self.layout, self.interleaved, self.biased = layout, interleaved, biased
        self.names = frozenset(names or ())

    def module(self, theirs: str, ours: str) -> Iterator[Piece]:
        """A multi-token module, with its own copies of the embedding and the output, as released."""
        dim, shared = self.layout.dim, (self.layout.vocabulary, self.layout.dim)
        output = "embedding.weight" if self.layout.tied else "output.weight"
        yield Piece(f"{theirs}.embed_tokens.weight", shared, "embedding.weight", copy=True, optional=True)
        yield Piece(f"{theirs}.enorm.weight", (dim,), f"{ours}.embedding_norm.weight")
        yield Piece(f"{theirs}.hnorm.weight", (dim,), f"{ours}.hidden_norm.weight")
        yield Piece(f"{theirs}.eh_proj.weight", (dim, 2 * dim), f"{ours}.projection.weight")
        yield from self.block(theirs, f"{ours}.block", dense=False)
        yield Piece(f"{theirs}.shared_head.norm.weight", (dim,), f"{ours}.norm.weight")
        yield Piece(f"{theirs}.shared_head.head.weight", shared, output, copy=True, optional=True)

    def block(self, theirs: str, ours: str, dense: bool) -> Iterator[Piece]:
        """One layer."""
        dim = self.layout.dim
        yield Piece(f"{theirs}.input_layernorm.weight", (dim,), f"{ours}.attention_norm.weight")
        yield from self.attention(f"{theirs}.self_attn", f"{ours}.attention")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", (dim,), f"{ours}.ffn_norm.weight")
        if dense:
            assert self.layout.hidden is not None
            yield from _swiglu(f"{theirs}.mlp", f"{ours}.ffn", dim, self.layout.hidden)
        else:
            yield from self.mixture(f"{theirs}.mlp", f"{ours}.ffn")

    def attention(self, theirs: str, ours: str) -> Iterator[Piece]:
        """MLA."""
        a, dim = self.layout.attention, self.layout.dim
        heads, rotated, q_rank, rank = a["heads"], a["rope_dim"], a["q_rank"], a["kv_rank"]
        key = a["nope_dim"] + rotated
        order = None if self.interleaved else _paired(heads, a["nope_dim"], rotated)
        if q_rank is None:
            yield Piece(f"{theirs}.q_proj.weight", (heads * key, dim), f"{ours}.q.weight", order=order, blocks=True)
        else:
            up = (heads * key, q_rank)
            yield Piece(f"{theirs}.q_a_proj.weight", (q_rank, dim), f"{ours}.q_down.weight", blocks=True)
            yield Piece(f"{theirs}.q_a_layernorm.weight", (q_rank,), f"{ours}.q_norm.weight")
            yield Piece(f"{theirs}.q_b_proj.weight", up, f"{ours}.q_up.weight", order=order, blocks=True)
        order = None if self.interleaved else _paired(1, rank, rotated)
        down, up = (rank + rotated, dim), (heads * (a["nope_dim"] + a["value_dim"]), rank)
        latent = f"{theirs}.kv_a_proj_with_mqa.weight"
        yield Piece(latent, down, f"{ours}.kv_down.weight", order=order, blocks=True)
        yield Piece(f"{theirs}.kv_a_layernorm.weight", (rank,), f"{ours}.kv_norm.weight")
        yield Piece(f"{theirs}.kv_b_proj.weight", up, f"{ours}.kv_up.weight", blocks=True)
        out = (dim, heads * a["value_dim"])
        yield Piece(f"{theirs}.o_proj.weight", out, f"{ours}.output.weight", blocks=True)

    def mixture(self, theirs: str, ours: str) -> Iterator[Piece]:
        """Router, bias, routed and shared experts."""
        section, dim = self.layout.experts, self.layout.dim
        assert section is not None
        experts, hidden, shared = section["experts"], section["expert_hidden"], section["shared_experts"]
        yield Piece(f"{theirs}.gate.weight", (experts, dim), f"{ours}.router.centroids.weight")
        if self.biased:
            bias = self.layout.bias
            place = None if bias is None else f"{ours}.balance.{bias.index}.bias"
            yield Piece(f"{theirs}.gate.e_score_correction_bias", (experts,), place, exact=True)
        packed = f"{theirs}.experts.gate_up_proj"
        if packed in self.names:
            yield Piece(packed, (experts, 2 * hidden, dim), f"{ours}.routed.gate_up.weight")
            down = (experts, dim, hidden)
            yield Piece(f"{theirs}.experts.down_proj", down, f"{ours}.routed.down.weight")
        else:
            for expert in range(experts):
                yield from _swiglu(f"{theirs}.experts.{expert}", f"{ours}.routed", dim, hidden, expert)
        theirs = f"{theirs}.shared_experts"
        if shared:
            yield from _swiglu(theirs, f"{ours}.shared", dim, shared * hidden)
        else:
            for name, shape in (("gate", (0, dim)), ("up", (0, dim)), ("down", (dim, 0))):
                yield Piece(f"{theirs}.{name}_proj.weight", shape, None, optional=True)


def _swiglu(theirs: str, ours: str, dim: int, hidden: int, expert: int = 0) -> Iterator[Piece]:
    """Three matrices of one SwiGLU, which may be one expert of many."""
    rows, wide = 2 * hidden * expert, (hidden, dim)
    yield Piece(f"{theirs}.gate_proj.weight", wide, f"{ours}.gate_up.weight", rows, blocks=True)
    yield Piece(f"{theirs}.up_proj.weight", wide, f"{ours}.gate_up.weight", rows + hidden, blocks=True)
    yield Piece(f"{theirs}.down_proj.weight", (dim, hidden), f"{ours}.down.weight", dim * expert, blocks=True)


@lru_cache(maxsize=8)
def _paired(heads: int, kept: int, rotated: int) -> tuple[int, ...]:
    """For each row of ours the row of theirs: `rotated` rows at the end of each head go from halves to pairs."""
    half = rotated // 2
    pairs = [kept + i + part * half for i in range(half) for part in (0, 1)]
    one = [*range(kept), *pairs]
    return tuple(head * (kept + rotated) + row for head in range(heads) for row in one)
