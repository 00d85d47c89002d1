"""The size of the validation text under a general compressor: the figure that a language model has to beat."""

import lzma

SMALLEST = 1 << 26
LARGEST = 3 << 29
"""Dictionary sizes in bytes: 64 MiB is `xz -9`'s own, 1.5 GiB the largest that the library takes."""


def xz_bits_per_byte(train: bytes, validation: bytes) -> float:
    """Bits per byte that `xz -9e` needs for `validation` when it has just compressed `train`.

    That is the growth of the compressed file when the validation text is appended to the training text. The
    dictionary reaches back over all of it (up to 1.5 GiB). The compression takes about 11 times the text in memory,
    and two seconds for each MB.

    Args:
        train: the training documents, joined in order of names.
        validation: the validation documents likewise; must not be empty.
    """
    dictionary = min(max(SMALLEST, len(train) + len(validation)), LARGEST)
    growth = _compressed(train + validation, dictionary) - _compressed(train, dictionary)
    return growth * 8 / len(validation)


def _compressed(text: bytes, dictionary: int) -> int:
    """The bytes of a text under `xz -9e` with a dictionary of that size."""
    preset = 9 | lzma.PRESET_EXTREME
    xz = {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=[xz]))
