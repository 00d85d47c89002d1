"""Random checkpoints as transformers writes them: configurations that cross every axis, and folders of them.

Every weight is random, norms and selection biases included, and affinities are spread out, so that a tensor in the
wrong place moves the logits and no choice of an expert is a matter of rounding. transformers is imported inside
functions: it takes seconds and need not be installed.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYERS, VOCABULARY, POSITIONS = 3, 263, 128
V3, V2 = "deepseek_v3", "deepseek_v2"

ROUTING: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": (V3, {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
    "v3_groups": (
        V3,
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "v3_best_two": (
        V3,
        {"n_routed_experts": 12, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 4},
    ),
    "v2": (V2, {"n_routed_experts": 6, "topk_method": "greedy", "num_experts_per_tok": 3}),
    "v2_groups": (
        V2,
        {
            "n_routed_experts": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
        },
    ),
}
"""The cases; in `v3_best_two` a group's score is the sum of its two best affinities although top_k / limit is 1."""

WIDTHS: dict[str, dict[str, int]] = {
    "values_narrow": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "values_wide": {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 6,
        "v_head_dim": 20,
    },
    "rope_wide": {
        "hidden_size": 40,
        "num_attention_heads": 4,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 16,
        "v_head_dim": 8,
    },
}

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 6,
    "beta_slow": 1,
}
YARN: dict[str, dict[str, Any] | None] = {
    "none": None,
    "equal": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "different": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "mscale_alone": {**_YARN, "mscale": 0.707},
    "all_dim_alone": {**_YARN, "mscale_all_dim": 0.8},
    "neither": dict(_YARN),
}

AXES: dict[str, tuple[Any, ...]] = {
    "routing": tuple(ROUTING),
    "yarn": tuple(YARN),
    "dense": (0, 1, LAYERS - 1),
    "widths": tuple(WIDTHS),
    "q_rank": (None, 24),
    "tied": (False, True),
    "interleave": (True, False),
    "normalise": (True, False),
    "scale": (1.0, 2.5),
    "shared": (1, 2),
    "layout": ("split", "packed", "sharded"),
    "style": ("transformers", "released"),
    "dtype": (torch.float32, torch.bfloat16, torch.float64),
}
"""`split`: a tensor for each expert; `packed`: one for all; `sharded`: split, over several files with an index.
`style`: config.json as transformers 5 writes it, or as the released checkpoints have it."""

FIXED_IN_V2 = {"interleave": True, "normalise": False}
"""transformers' DeepSeek-V2 knows neither."""


@dataclass(frozen=True)
class Case:
    """One configuration.

    Args:
        point: a value for each axis.
        config: keys of config.json that are laid over those of the axes.
    """

    point: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.config.items()]
        return "-".join([*(str(self.point[axis]).removeprefix("torch.") for axis in AXES), *words])

    @property
    def family(self) -> str:
        """transformers' `model_type`."""
        return ROUTING[self.point["routing"]][0]

    @property
    def seed(self) -> int:
        """A number that only the name decides."""
        return zlib.crc32(str(self).encode())

    def but(self, **axes: Any) -> "Case":
        """The same with other values on some axes."""
        return replace(self, point={**self.point, **axes})

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' configuration class."""
        point, (family, routing) = self.point, ROUTING[self.point["routing"]]
        rope = YARN[point["yarn"]] or {"rope_type": "default"}
        only_v3 = {"rope_interleave": point["interleave"], "norm_topk_prob": point["normalise"]}
        widths = WIDTHS[point["widths"]]
        return {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": POSITIONS,
            "intermediate_size": 44,
            "moe_intermediate_size": 12,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "first_k_dense_replace": point["dense"],
            "q_lora_rank": point["q_rank"],
            "tie_word_embeddings": point["tied"],
            "routed_scaling_factor": point["scale"],
            "n_shared_experts": point["shared"],
            "rope_parameters": {**rope, "rope_theta": 1000.0},
            **widths,
            "num_key_value_heads": widths["num_attention_heads"],
            **routing,
            **(only_v3 if family == V3 else {}),
            **self.config,
        }


def covering() -> list[Case]:
    """Cases in which every two values of two axes that can meet do meet; greedy, always the same."""
    missing = {pair for pair in _pairs() if _can_be(dict(pair))}
    cases = []
    while missing:
        point = dict(min(missing, key=repr))
        while len(point) < len(AXES):
            options = [
                (axis, value)
                for axis in AXES
                if axis not in point
                for value in AXES[axis]
                if _can_be({**point, axis: value})
            ]
            used = [case.point for case in cases]
            axis, value = max(
                options, key=lambda option: (_gain(point, *option, missing), -_count(used, *option))
            )
            point[axis] = value
        missing -= set(_pairs_of(point))
        cases.append(Case(point))
    return cases


def _pairs() -> Iterator[tuple[tuple[str, Any], ...]]:
    for one, other in combinations(AXES, 2):
        yield from (((one, a), (other, b)) for a in AXES[one] for b in AXES[other])


def _pairs_of(point: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], ...]]:
    for one, other in combinations([axis for axis in AXES if axis in point], 2):
        yield ((one, point[one]), (other, point[other]))


def _can_be(point: Mapping[str, Any]) -> bool:
    of_v2 = "routing" in point and ROUTING[point["routing"]][0] == V2
    return not of_v2 or all(point.get(axis, value) == value for axis, value in FIXED_IN_V2.items())


def _gain(point: Mapping[str, Any], axis: str, value: Any, missing: set[Any]) -> int:
    return sum(axis in dict(pair) for pair in set(_pairs_of({**point, axis: value})) & missing)


BASE = Case(
    {
        "routing": "v3_groups",
        "yarn": "equal",
        "dense": 1,
        "widths": "values_narrow",
        "q_rank": 24,
        "tied": False,
        "interleave": True,
        "normalise": True,
        "scale": 2.5,
        "shared": 1,
        "layout": "split",
        "style": "transformers",
        "dtype": torch.float32,
    }
)
"""DeepSeek-V3 in small, for tests that are not about the axes."""

V2_BASE = BASE.but(routing="v2_groups", normalise=False)


def _count(points: list[Mapping[str, Any]], axis: str, value: Any) -> int:
    return sum(point[axis] == value for point in points)


def transformers_or_skip() -> Any:
    """transformers, kept quiet and off the network; where it is not installed the test is skipped and says so."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    why = "transformers>=5 is not installed (it is part of moeloom[test], which CI installs)"
    found = pytest.importorskip("transformers", minversion="5", reason=why)
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def random_model(case: Case) -> Any:
    """transformers' model of a configuration, in fp64, in evaluation mode, with random weights."""
    import transformers

    name = {V3: "DeepseekV3", V2: "DeepseekV2"}[case.family]
    config = getattr(transformers, f"{name}Config")(**case.settings())
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    fill(model, case.seed)
    return model


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Gives every parameter and every selection bias random values."""
    draw = torch.Generator().manual_seed(seed)
    named = [
        *model.named_parameters(),
        *(b for b in model.named_buffers() if "e_score_correction_bias" in b[0]),
    ]
    for name, tensor in sorted(named):
        tensor.copy_(_random(name, tensor, draw))


def _random(name: str, like: Tensor, draw: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=draw, dtype=torch.float64)
    if "norm" in name:
        return 1 + 0.3 * noise
    if "e_score_correction_bias" in name:
        return (0.15 * noise - 1).float().double()  # below zero: a masked group's 0 would win
    if "embed_tokens" in name:
        return 0.5 * noise
    return noise * (2.0 if name.endswith("gate.weight") else 1.0) / like.shape[-1] ** 0.5


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids B x L."""
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model in another number format; selection biases stay at least fp32, as transformers keeps them."""
    biases = {
        name: value for name, value in model.named_buffers() if "e_score_correction_bias" in name
    }
    copy = deepcopy(model).to(dtype)
    for name, value in biases.items():
        copy.get_submodule(name.rpartition(".")[0]).e_score_correction_bias.data = value.to(
            torch.promote_types(dtype, torch.float32)
        )
    if dtype == torch.float64:
        copy.set_experts_implementation("eager")  # the grouped product refuses fp64
    return copy


def save(case: Case, model: Any, folder: Path) -> Path:
    """Writes a model as transformers does, in the case's layout and style."""
    options: dict[str, Any] = {
        "packed": {"save_original_format": False},
        "sharded": {"max_shard_size": "30KB"},
    }
    model.save_pretrained(folder, **options.get(case.point["layout"], {}))
    if case.point["style"] == "released":
        config = read_config(folder)
        (folder / "config.json").write_text(json.dumps(as_released(config)), encoding="utf-8")
    return folder


def as_released(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the words of the released checkpoints."""
    taken = (
        "rope_parameters",
        "dtype",
        "head_dim",
        "qk_head_dim",
        "transformers_version",
        "output_router_logits",
    )
    kept = {key: value for key, value in config.items() if key not in taken}
    rope = dict(config["rope_parameters"])
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    own = (
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc"} if config["model_type"] == V3 else {}
    )
    return {
        **kept,
        **own,
        **({} if config["model_type"] == V3 else {"scoring_func": "softmax"}),
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {**rope, "type": kind},
        "torch_dtype": config["dtype"],
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "transformers_version": "4.33.1",
    }


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def meaning(folder: Path) -> dict[str, Any]:
    """What a config.json means to transformers, with every key that it keeps for others; not who wrote it when."""
    from transformers import AutoConfig

    keys = AutoConfig.from_pretrained(folder).to_dict()
    keys["rope_parameters"].pop("type", None)  # another word for rope_type, which is there too
    for key in ("_name_or_path", "auto_map", "transformers_version"):
        keys.pop(key, None)
    if not any(
        name.startswith(f"model.layers.{keys['num_hidden_layers']}.")
        for name in read_tensors(folder)
    ):
        keys.pop("num_nextn_predict_layers", None)  # transformers writes 1 without such a layer
    return dict(keys)


def change_config(folder: Path, **keys: Any) -> None:
    """Sets keys of config.json; one that is set to `...` goes."""
    config = {**read_config(folder), **keys}
    text = json.dumps({k: v for k, v in config.items() if v is not ...})
    (folder / "config.json").write_text(text, encoding="utf-8")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint, and checks that an index agrees with the files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert (opened.metadata() or {}).get("format") == "pt", (
                f"{file}: transformers asks for format = pt"
            )
            for name in opened.keys():  # noqa: SIM118
                assert name not in found, f"{name} is in two files"
                found[name] = (file.name, opened.get_tensor(name))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        assert content["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert content["metadata"]["total_size"] == sum(
            t.numel() * t.element_size() for _, t in found.values()
        )
    else:
        assert {file for file, _ in found.values()} == {"model.safetensors"}
    return {name: tensor for name, (_, tensor) in found.items()}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, files: int = 1) -> None:
    """Replaces a checkpoint's weights, spread over so many files."""
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(files):
        part = names[number::files]
        name = (
            "model.safetensors"
            if files == 1
            else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        )
        own = {key: tensors[key].contiguous().clone() for key in part}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    if files > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def mtp_tensors(case: Case, depths: int, scratch: Path) -> dict[str, Tensor]:
    """The tensors of the multi-token modules of a DeepSeek-V3 configuration, without the copies of what is shared.

    The blocks are transformers' own layers with experts, one for each depth, saved by transformers.
    """
    blocks = random_model(
        replace(case.but(dense=0), config={**case.config, "num_hidden_layers": depths})
    )
    save(case, in_dtype(blocks, case.point["dtype"]), scratch)
    draw, dim = torch.Generator().manual_seed(case.seed), case.settings()["hidden_size"]
    found = {}
    for name, tensor in read_tensors(scratch).items():
        if name.startswith("model.layers."):
            depth, rest = name.removeprefix("model.layers.").split(".", 1)
            found[f"model.layers.{LAYERS + int(depth)}.{rest}"] = tensor
    for layer in range(LAYERS, LAYERS + depths):
        shapes = {
            "enorm": (dim,),
            "hnorm": (dim,),
            "eh_proj": (dim, 2 * dim),
            "shared_head.norm": (dim,),
        }
        for part, shape in shapes.items():
            name = f"model.layers.{layer}.{part}.weight"
            found[name] = _random(name, torch.empty(shape), draw).to(case.point["dtype"])
    return found


def shared_copies(tensors: Mapping[str, Tensor], depths: int) -> dict[str, Tensor]:
    """The copies of embedding and output that released multi-token layers carry."""
    embedding = tensors["model.embed_tokens.weight"]
    copies = {}
    for layer in range(LAYERS, LAYERS + depths):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        copies[f"model.layers.{layer}.shared_head.head.weight"] = tensors.get(
            "lm_head.weight", embedding
        )
    return copies
