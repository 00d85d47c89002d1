"""What a general compressor makes of the validation text: the figure that a language model has to beat."""

import lzma

SMALLEST, LARGEST = 1 << 26, 3 << 29
"""Dictionary sizes in bytes: 64 MiB is `xz -9`'s own, 1.5 GiB the largest that the library takes."""


def xz_bits_per_byte(train: bytes, validation: bytes) -> float:
    """Bits per byte that `xz -9e` needs for `validation` when it has just compressed `train`.

    That is the growth of the compressed file when the validation text is put behind the training text. The
    dictionary reaches back over all of it (up to 1.5 GiB); it takes about 11 times
    the text in memory, and two seconds for each MB.

    Args:
        train: the training documents, one behind the other in order of names.
        validation: the validation documents likewise; must not be empty.
    """
    reach = min(max(SMALLEST, len(train) + len(validation)), LARGEST)
    growth = _compressed(train + validation, reach) - _compressed(train, reach)
    return growth * 8 / len(validation)


def _compressed(text: bytes, reach: int) -> int:
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": reach}
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=[xz]))
