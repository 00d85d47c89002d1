"""Checkpoints of other programs: streaming safetensors in and out. Names and configurations belong to plugins."""
