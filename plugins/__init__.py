"""The built-in plugins: one package each, found through the same entry points as plugins from other packages."""
