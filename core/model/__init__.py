"""The model that every recipe shares: embedding, blocks, norms, rotary positions, attention, output.

Shape letters, also of `core.routing` and `core.numerics`: B batch, L length, S length attended to, T = B x L tokens,
D model width, V vocabulary, E experts, K choices per token, A assignments, H heads, I and O inner widths.
"""
