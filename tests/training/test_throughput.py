"""The peak that MFU refers to: from Lightning's table, or measured in the format of the products."""

from typing import Any

import pytest
import torch
from lab import Lab

from core.training import throughput
from core.training.throughput import Throughput, peak_of

MEASURED = 3e12
IN_TABLE = 5e12


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """The devices and formats that are measured; nothing is."""
    found: list[tuple[str, torch.dtype]] = []

    def measured(device: torch.device, *, dtype: torch.dtype) -> float:
        found.append((device.type, dtype))
        return MEASURED

    monkeypatch.setattr(throughput, "measured_peak_flops", measured)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return found


def table(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, int]) -> None:
    """Fakes Lightning's table for the only GPU that there is."""

    def known(device: torch.device, dtype: torch.dtype) -> int | None:
        return rates.get(dtype) if device.type == "cuda" else None

    monkeypatch.setattr(throughput, "get_available_flops", known)


@pytest.mark.parametrize(
    ("device", "products", "measured"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float32, torch.float32),
        ("cuda", torch.float8_e4m3fn, torch.bfloat16),
        ("cpu", torch.bfloat16, torch.float32),
        ("cpu", torch.float64, torch.float32),
    ],
)
def test_P58_a_device_that_is_not_in_the_table_is_measured(
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[str, torch.dtype]],
    device: str,
    products: torch.dtype,
    measured: torch.dtype,
) -> None:
    table(monkeypatch, {})
    assert peak_of(torch.device(device), products) == (MEASURED, "measured")
    assert asked == [(device, measured)]


def test_P58_a_device_in_the_table_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, torch.dtype]]
) -> None:
    """The rate is that of the products' format, not of the weights' as Lightning takes it."""
    table(monkeypatch, {torch.bfloat16: int(IN_TABLE), torch.float32: 1})
    assert peak_of(torch.device("cuda"), torch.bfloat16) == (IN_TABLE, "table")
    assert peak_of(torch.device("cuda"), torch.float8_e4m3fn) == (IN_TABLE, "table")
    assert peak_of(torch.device("meta"), torch.bfloat16) == (None, None)
    assert asked == []


def test_P58_the_callback_asks_for_the_format_of_the_recipe(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
        asked.append(dtype)
        return IN_TABLE, "table"

    monkeypatch.setattr(throughput, "peak_of", peak)
    callback = Throughput(None)
    lab.train("budget.steps=1", "precision.name=bf16", callbacks=[callback])
    assert asked == [torch.bfloat16]
    assert (callback.available_flops, callback.peak_source) == (IN_TABLE, "table")
    given = Throughput(MEASURED)
    lab.train("budget.steps=1", callbacks=[given])
    assert (given.available_flops, given.peak_source) == (MEASURED, "measured")
    assert len(asked) == 1
