"""Bits per byte of a general compressor, which a language model has to beat."""

import random

import pytest

from core.data.baseline import xz_bits_per_byte


def test_text_that_was_in_the_training_split_costs_almost_nothing() -> None:
    train = random.Random(0).randbytes(50_000)
    assert xz_bits_per_byte(train, train[10_000:40_000]) < 0.25


def test_noise_costs_eight_bits() -> None:
    draw = random.Random(0)
    assert xz_bits_per_byte(draw.randbytes(20_000), draw.randbytes(50_000)) == pytest.approx(
        8, abs=0.02
    )
