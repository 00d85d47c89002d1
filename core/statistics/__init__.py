"""Statistics for comparing training runs: paired differences over seeds, and smoothed training curves."""
