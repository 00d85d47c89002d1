"""Writes text with a model: prompts in, tokens out, one by one from its caches or several at once from drafts."""
