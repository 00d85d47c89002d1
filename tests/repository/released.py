"""The parameters of a released DeepSeek model, counted by hand from its configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """A released config.json, under its own keys."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    correction_bias: bool

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention, matrix by matrix as the checkpoint has them."""
        heads, width = self.num_attention_heads, self.hidden_size
        key = self.qk_nope_head_dim + self.qk_rope_head_dim
        kv_a_proj_with_mqa = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_b_proj = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        o_proj = heads * self.v_head_dim * width
        if self.q_lora_rank is None:
            queries = width * heads * key
        else:
            queries = width * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * heads * key
        return queries + kv_a_proj_with_mqa + self.kv_lora_rank + kv_b_proj + o_proj

    def mlp(self, intermediate: int) -> int:
        """Parameters of gate_proj, up_proj and down_proj."""
        return 3 * self.hidden_size * intermediate

    @property
    def total(self) -> int:
        """Number of parameters in the checkpoint, without multi-token layers."""
        sparse = self.num_hidden_layers - self.first_k_dense_replace
        layers = self.num_hidden_layers * (self.attention + 2 * self.hidden_size)
        dense = self.first_k_dense_replace * self.mlp(self.intermediate_size)
        gate = self.n_routed_experts * self.hidden_size + (
            self.n_routed_experts if self.correction_bias else 0
        )
        routed = self.n_routed_experts * self.mlp(self.moe_intermediate_size)
        shared = self.mlp(self.n_shared_experts * self.moe_intermediate_size)
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return ends + layers + dense + sparse * (gate + routed + shared)

    @property
    def active(self) -> int:
        """Number of parameters without the embedding, the experts that a token does not use, and the biases."""
        sparse = self.num_hidden_layers - self.first_k_dense_replace
        idle = (self.n_routed_experts - self.num_experts_per_tok) * self.mlp(
            self.moe_intermediate_size
        )
        biases = self.n_routed_experts if self.correction_bias else 0
        return self.total - self.vocab_size * self.hidden_size - sparse * (idle + biases)
