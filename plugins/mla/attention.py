"""Multi-head Latent Attention (DeepSeek-V2, eq. 37-47; DeepSeek-V3 report, eq. 1-11)."""

from dataclasses import dataclass

from core.model.latent_attention import LatentAttentionBase, LatentWidths


class LatentAttention(LatentAttentionBase):
    """Multi-head Latent Attention, with norms on the two latents only, not on the rotated key or single heads."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.1"
    example = {
        "name": "mla",
        "heads": 4,
        "q_rank": 24,
        "kv_rank": 16,
        "nope_dim": 16,
        "rope_dim": 8,
        "value_dim": 16,
    }

    @dataclass(kw_only=True)
    class Config(LatentWidths):
        """Widths of Multi-head Latent Attention."""
