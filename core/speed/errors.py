"""Errors of a peer, in a word: one that does not run here is a result."""


def in_a_word(cause: Exception) -> str:
    """An exception as a table shows it: its type and the beginning of its first sentence."""
    message = " ".join(str(cause).split()).partition(". ")[0]
    return f"{type(cause).__name__}: {message[:100]}"
