"""What a conversion holds in memory does not grow with the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.interop.tensors import TensorSpec
from core.interop.writing import ShardWriter, planned

from .checkpoints import V3, block_shapes

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20
MEASURED = """
import json, sys
from core import convert
from core.command import run_command
from core.interop import from_hf, to_hf
import core.run.loading
from core.training.host_memory import resident
before = resident()[1]
sys.argv = ["core/convert.py", *sys.argv[1:]]
run_command(convert.main, convert.parser())
print(json.dumps({"before": before, "after": resident()[1]}))
"""


def converted(*arguments: str | Path) -> dict[str, int]:
    """A conversion in a process of its own: the most it held before the work began, and at the end."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def large(folder: Path, shard: int, **sizes: int) -> Path:
    """A checkpoint of zeros in bf16, in files of at most `shard` bytes."""
    config: dict[str, Any] = {**V3, **sizes}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": s for name, s in block_shapes(config, layer).items()
        }
    shapes |= {
        "model.norm.weight": (config["hidden_size"],),
        "lm_head.weight": shapes["model.embed_tokens.weight"],
    }
    folder.mkdir()
    ShardWriter(
        folder, planned({n: TensorSpec(torch.bfloat16, s) for n, s in shapes.items()}, shard)
    ).create()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_few_chunks_are_held(tmp_path: Path) -> None:
    """300 MB in one file, with one tensor of 130 MB."""
    sizes = {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "vocab_size": 65536,
        "n_routed_experts": 8,
    }
    source = large(tmp_path / "source", 10**10, **sizes)
    assert sum(f.stat().st_size for f in source.glob("*.safetensors")) > 280 * MEGABYTE
    there = converted("from-hf", source, tmp_path / "run")
    back = converted("to-hf", tmp_path / "run", tmp_path / "back")
    fp8 = converted("to-hf", tmp_path / "run", tmp_path / "fp8", "--fp8")
    for held in (there, back, fp8):
        assert held["after"] - held["before"] < 200 * MEGABYTE


@pytest.mark.full
def test_a_checkpoint_of_several_files_needs_less_than_one_of_them_and_a_gigabyte(
    tmp_path: Path,
) -> None:
    """1.8 GB in five files of 0.45 GB: the whole process, libraries included."""
    sizes = {
        "hidden_size": 2048,
        "moe_intermediate_size": 1024,
        "vocab_size": 32768,
        "n_routed_experts": 64,
    }
    source = large(tmp_path / "source", 450 * 10**6, **sizes)
    files = [f.stat().st_size for f in source.glob("*.safetensors")]
    assert len(files) >= 4
    assert sum(files) > 1.5e9
    for arguments in (
        ("from-hf", source, tmp_path / "run"),
        ("to-hf", tmp_path / "run", tmp_path / "back"),
    ):
        assert converted(*arguments)["after"] < max(files) + 10**9
