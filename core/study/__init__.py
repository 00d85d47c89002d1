"""Sweeps: many runs of one question."""
