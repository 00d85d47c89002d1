"""The way from a YAML file to validated dataclasses; nothing here imports torch."""
