"""The built-in plugins: one room each, entering by the same entry points as anybody's."""
