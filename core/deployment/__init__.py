"""Inference that keeps its balance: redundant experts, where they are placed, and models that run on them."""
