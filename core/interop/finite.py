"""A reader of tensors that rejects numbers which are not finite, or reports the first of them.

Every operation of a conversion and every loading of a model reads through it, so that none can forget the check. It
looks at the numbers as they are asked for, after the cast to another format: a cast keeps NaN and infinities, and can
make new infinities.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from core.contracts.errors import NotFiniteError
from core.interop.tensors import CODES, DTYPES, SCALE, TensorReader
from core.numerics.finite import at, first_not_finite

FORMAT_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch use one thread: waiting for a second one takes longer than the check where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class FiniteTensors(TensorReader):
    """The tensors of another reader, whose numbers are checked when they are read with `values`.

    Args:
        tensors: the reader.
        where: the file or folder, for the error message.
        hint: the end of the error message, which says what to do.
        allow: None: a number that is not finite is an error. Otherwise it is called with one sentence about the first
            such tensor, and all numbers are let through.
    """

    def __init__(
        self,
        tensors: TensorReader,
        where: str,
        hint: str = "",
        allow: Callable[[str], None] | None = None,
    ) -> None:
        self.specs = tensors.specs
        self._tensors = tensors
        self._where = where
        self._hint = f"; {hint}" if hint else ""
        self._allow = allow
        self._reported = False

    @classmethod
    def to_convert(
        cls,
        tensors: TensorReader,
        source: Path,
        say: Callable[[str], None],
        *,
        allow: bool,
        fp8: bool = False,
    ) -> "FiniteTensors":
        """Makes the reader of a conversion.

        Args:
            tensors: the reader of the source.
            source: the file or folder, for messages.
            say: called with each message for the user.
            allow: whether numbers that are not finite are converted.
            fp8: whether matrices are quantised to FP8 blocks, which cannot hold such numbers.
        """
        if allow:
            return cls(tensors, str(source), allow=say)
        hint = "--allow-non-finite converts it all the same"
        if fp8:
            hint = "FP8 blocks cannot hold it; without --fp8, --allow-non-finite converts it all the same"
        return cls(tensors, str(source), hint)

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Returns rows as they are stored, unchecked."""
        return self._tensors.read_rows(name, begin, end)

    def values(self, name: str, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns rows as numbers.

        Raises:
            NotFiniteError: a number is not finite, or too large for `dtype`; tensor, number and place are named.
        """
        rows = self._tensors.values(name, begin, end, dtype)
        if self._reported:
            return rows
        with _one_thread():
            index = first_not_finite(rows)
        if index is None:
            return rows
        found = self._sentence(name, begin + index[0], index[1], dtype)
        if self._allow is None:
            raise NotFiniteError(f"{found}{self._hint}")
        self._reported = True
        self._allow(f"note: {found}; this and all later ones are converted as they are")
        return rows

    def _sentence(self, name: str, row: int, column: int, dtype: torch.dtype) -> str:
        """Says which number of a tensor is at fault, and whether it is so by itself or by the cast."""
        base = name.removesuffix(SCALE)
        if base != name and base in self.specs:
            value = float(self._tensors.read_rows(name, row, row + 1)[0, column])
            return f"{self._where}: tensor {base} has an FP8 scale that is not finite ({value})"
        wide = self._tensors.values(name, row, row + 1, torch.float64)
        value = float(wide[0, column])
        place = at(value, self._index(name, row, column))
        finite = bool(wide.isfinite()[0, column])
        if finite and dtype != CODES:
            format_name = FORMAT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
            return (
                f"{self._where}: tensor {name} holds {place}, which is too large for {format_name}"
            )
        return f"{self._where}: tensor {name} holds a number that is not finite ({place})"

    def _index(self, name: str, row: int, column: int) -> tuple[int, ...]:
        """The index in the whole tensor of an element of its rows."""
        shape = self.specs[name].shape
        index: list[int] = []
        for size in reversed(shape[:-1]):
            row, place = divmod(row, size)
            index.insert(0, place)
        if shape:
            index.append(column)
        return tuple(index)
