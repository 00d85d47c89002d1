"""The way from documents to optimizer-step windows: corpus, tokenizer, packed token store, loaders.

Everything up to the packed store works without torch; only `batch`, `windows`, `loaders` and `module`
make tensors, and only `module` uses Lightning. Importing this package imports nothing else.
"""
