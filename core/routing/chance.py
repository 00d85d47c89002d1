"""Random numbers with addresses: no stream that a change could shift.

A number is drawn from (seed, what it is for, step, layer, number of the sequence, position), so neither splitting
a batch nor adding ranks nor recomputing changes it, and no other draw moves it. The words are hashed once for a
call; each place is then mixed in with the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in 64-bit
integers that are the same on every device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.numerics.draw import address

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def uniform(seed: int, words: str, *places: Tensor) -> Tensor:
    """A number in [0, 1) for each place.

    Args:
        seed: the run's.
        words: what the numbers are for.
        places: int64 coordinates that broadcast together.

    Returns:
        fp64, of the broadcast shape.
    """
    state = hashed(address(seed, words), *places)
    return _shifted(state, 11).to(torch.float64) * 2.0**-53


def hashed(first: int, *places: Tensor) -> Tensor:
    """A number of 64 bits for each place, int64 of the broadcast shape.

    Args:
        first: tells numbers for one purpose from those for another.
        places: int64 coordinates that broadcast together.
    """
    state = torch.full((), first, dtype=torch.int64, device=places[0].device)
    for place in places:
        state = _mixed(state + (place + 1) * _GOLDEN)
    return state


@dataclass(frozen=True)
class Chance:
    """The random numbers of one layer.

    Args:
        seed: the run's.
        layer: which layer; None: the same numbers in every layer.
    """

    seed: int
    layer: int | None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of_tokens(self, context: SequenceContext, what: str, width: int | None = None) -> Tensor:
        """Numbers in [0, 1) for every token, fp64: T, or T x width."""
        sequence_T, position_T = token_places(context)
        words = self._words(what, context)
        if width is None:
            return uniform(self.seed, words, sequence_T, position_T)
        feature_D = torch.arange(width, device=sequence_T.device)
        return uniform(self.seed, words, sequence_T[:, None], position_T[:, None], feature_D)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of_sequences(self, context: SequenceContext, what: str) -> Tensor:
        """A number in [0, 1) for every sequence, fp64: B."""
        return uniform(self.seed, self._words(what, context), _sequences(context))

    def _words(self, what: str, context: SequenceContext) -> str:
        return f"{what}:{context.step}:{self.layer}"


def token_places(context: SequenceContext) -> tuple[Tensor, Tensor]:
    """Each token's sequence, numbered within the step, and its position in the sequence: int64, T each."""
    batch, length = context.tokens_BL.shape
    positions_T = context.positions_BL.expand(batch, length).flatten()
    return _sequences(context).repeat_interleave(length), positions_T


def _sequences(context: SequenceContext) -> Tensor:
    """The number of each sequence within the step: int64 B."""
    rows_B = torch.arange(context.tokens_BL.shape[0], device=context.tokens_BL.device)
    return rows_B + context.first_sequence


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finalizer."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical right shift, which int64 lacks: zeros come in at the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
