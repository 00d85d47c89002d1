"""From documents to optimizer-step windows: corpus, tokenizer, packed token store, loaders.

Everything up to the packed store works without torch; only `batch`, `windows`, `loaders` and `module`
make tensors, and only `module` knows Lightning. This package imports nothing when it is imported.
"""
