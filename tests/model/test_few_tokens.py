"""Kernels for few tokens: their arithmetic in Triton's interpreter, and when they are not used."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.model import few_tokens
from plugins.deepseek_moe import chosen

SCRIPT = """
import torch
from core.model import few_tokens
from core.numerics import decoding_kernels
cpu = torch.device("cpu")
assert few_tokens.agrees(decoding_kernels, cpu, torch.bfloat16)
few_tokens.TOLERANCE[torch.float32] = 1e-6
assert few_tokens.agrees(decoding_kernels, cpu, torch.float32)
few_tokens.TOLERANCE[torch.float32] = 0.0
assert not few_tokens.agrees(decoding_kernels, cpu, torch.float32), "nothing is compared"
"""


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_agree_with_torch_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_reference_of_the_kernels_is_what_cpus_compute() -> None:
    """One token after the other, one expert after the other."""
    x_TD, gate_up_EXD, down_EDI = random(3, 6), random(4, 10, 6, seed=1), random(4, 6, 5, seed=2)
    expert_TK, gate_TK = torch.tensor([[3, 0], [1, 2], [2, 3]]), random(3, 2, seed=3)
    expected_TD = torch.zeros(3, 6, dtype=torch.float64)
    for token in range(3):
        for expert, gate in zip(expert_TK[token].tolist(), gate_TK[token], strict=True):
            products = gate_up_EXD[expert] @ x_TD[token]
            hidden = F.silu(products[:5]) * products[5:]
            expected_TD[token] += gate * (down_EDI[expert] @ hidden)
    arguments = (x_TD, gate_up_EXD, down_EDI, expert_TK, gate_TK)
    for function in (few_tokens.gated_experts, chosen.gated_experts):
        torch.testing.assert_close(function(*arguments), expected_TD, rtol=1e-12, atol=1e-12)


def test_kernels_are_for_few_tokens_on_a_gpu_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace()
    monkeypatch.setattr(few_tokens, "_verified", lambda device: module)
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda:0")
    wide: Any = SimpleNamespace(is_cuda=True, dtype=torch.float64, device="cuda:0")
    with torch.no_grad():
        assert few_tokens.kernels(on_gpu, 4, 64) is module
        assert few_tokens.kernels(wide, 4, 64) is None
        assert few_tokens.kernels(on_gpu, 257, 64) is None
        assert few_tokens.kernels(on_gpu, 4, 16385) is None
        assert few_tokens.kernels(torch.zeros(4, 64), 4, 64) is None
    assert few_tokens.kernels(on_gpu, 4, 64) is None, "gradients"


def test_kernels_that_differ_or_cannot_run_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    few_tokens._verified.cache_clear()
    monkeypatch.setattr(few_tokens, "agrees", lambda *arguments: False)
    with pytest.warns(UserWarning, match="kernels of decoding differ from torch's operations"):
        assert few_tokens._verified("cpu") is None
    few_tokens._verified.cache_clear()

    def fail(*arguments: Any) -> bool:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(few_tokens, "agrees", fail)
    with pytest.warns(UserWarning, match=r"cannot run \(RuntimeError: no C compiler\); torch's"):
        assert few_tokens._verified("cpu") is None
    few_tokens._verified.cache_clear()
