"""Random recipes at toy width, drawn from the schemas of the core and of every component that is registered."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lab import write_texts

from core.contracts.schedule import Schedule
from core.contracts.schema import REQUIRED
from core.extension.loader import installed_registry
from core.recipe.recipe_schema import RecipeSchema
from core.recipe.values import hints_of, nested_section

FIXED = """\
data: {{corpus: {{name: files, paths: ["{texts}/*.txt"]}}}}
loggers: []
strategy: {{name: single, accelerator: cpu}}
trainer: {{enable_progress_bar: false, enable_model_summary: false}}
checkpoint: {{every_steps: 100}}
"""
"""What every drawn recipe shares: nothing here starts a process or needs a device."""

NOT_DRAWN = {
    "": [
        "plugins",
        "strategy",
        "callbacks",
        "loggers",
        "initial_weights",
        "trainer",
        "smoke",
        "checkpoint",
        "compile",
        "cuda_graph",
        "max_skipped_steps",
    ],
    "data": ["corpus", "validation"],
    "budget": ["tokens", "flops"],
}
"""Keys that are fixed, by section: they change where a run is written and how, not what a step computes."""

SIZES: Mapping[str, tuple[Any, ...]] = {
    "model.dim": (16, 24, 32),
    "model.init.std": (0.0, 0.02, 0.1),
    "model.blocks.*.count": (1, 1, 1, 1, 1, 1, 2, 0),
    "model.attention.q_rank": (4, 8, 8, None),
    "model.attention.rope_dim": (2, 4, 8, 0),
    "model.attention.value_dim": (1, 4, 8),
    "model.attention.heads": (1, 2, 4),
    "model.rope.max_length": (16, 16, 64, 64, 64),
    "model.rope.yarn.original_length": (8, 32, 32),
    "model.rope.yarn.factor": (2.0, 2.0, 40.0),
    "model.rope.theta": (10000.0, 100.0, 1.0),
    "model.norm_eps": (1e-6, 1e-3),
    "model.blocks.*.ffn.experts": (1, 2, 4, 4, 8, 8),
    "model.blocks.*.ffn.expert_hidden": (1, 4, 8),
    "model.heads.depth": (1, 1, 2, 6),
    "optimizer.lr": (0.0, 0.001, 0.1),
    "optimizer.algorithm": ("AdamW", "SGD", "NAdam", "Adafactor"),
    "optimizer.betas": ([0.9, 0.95], [0.0, 0.0]),
    "optimizer.eps": (1e-8, 1e-3),
    "optimizer.momentum": (0.0, 0.95),
    "optimizer.split": ({}, {"*.gate_up": 2}),
    "optimizer.adamw.eps": (1e-8, 1e-3),
    "model.residual.eps": (1e-6, 1e-3),
    "data.sequence_length": (1, 2, 4, 7, 8, 8, 16, 16),
    "data.tokenizer.vocab": (257, 260, 300, 300),
    "data.tokenizer.pad_to_multiple_of": (1,),
    "data.validation_fraction": (0.1, 0.5, None),
    "data.fim.rate": (0.1, 0.5, 1.0),
    "skip_spikes.factor": (1.0, 1.5, 3.0, 3.0),
    "batch.sequences": (1, 2, 3),
    "budget.steps": (2,),
    "validation.sequences": (1, 2, 3, 5),
    "seed": (0, 1, 7),
    "gradient_clip": (0.1, 1.0),
}
"""Toy values of the core's own numbers, by key path; others are drawn from `WHOLE` and `REAL`."""

WHOLE = (1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 16, 0, 3)
REAL = (0.5, 0.5, 1.0, 1.0, 1.0, 0.0, 1.5, 8.0)


ROLE_PATTERNS = ([], ["*"], ["head", "attention.*"], ["experts.*", "head", "mtp.*"])
"""Lists of roles that a precision's keys may name."""


def _listed(path: str) -> str:
    """The path under which `SIZES` lists a key of a block: its attention has the sizes of the model's."""
    path = re.sub(r"^model\.blocks\.\w+\.", "model.blocks.*.", path)
    return path.replace("model.blocks.*.attention.", "model.attention.")


class RecipeDraw:
    """Draws one recipe.

    A component's section begins as its `example`, with each of its keys drawn anew with probability `change`.

    Args:
        seed: the seed; equal seeds give equal recipes for equal schemas.
    """

    change = 0.15

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.registry = installed_registry()

    def overrides(self) -> list[str]:
        """The recipe as overrides of the fixed one, one for each section."""
        values = self._section(RecipeSchema, "", {})
        texts = []
        for key, value in values.items():
            if key == "data":
                texts += [f"data.{inner}={json.dumps(item)}" for inner, item in value.items()]
            else:
                texts.append(f"{key}={json.dumps(value)}")
        return texts

    def _section(self, schema: Any, path: str, base: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of one section; those that keep their default are left out."""
        values: dict[str, Any] = {}
        hints = hints_of(schema)
        for f in fields(schema):
            if f.name in NOT_DRAWN.get(path, ()):
                continue
            where = f"{path}.{f.name}".lstrip(".")
            if "slot" in f.metadata:
                values[f.name] = self._children(f, where, values)
            elif f.name in base and self.random.random() > self.change:
                values[f.name] = base[f.name]
            elif self._is_drawn(f, where):
                values[f.name] = self._value(hints[f.name], where)
        return {key: value for key, value in values.items() if value is not _DEFAULT}

    def _is_drawn(self, f: Field[Any], path: str) -> bool:
        """Whether a key is drawn: always if it is required or its values are listed, else by chance."""
        required = f.default == REQUIRED and f.default_factory is MISSING
        return required or _listed(path) in SIZES or self.random.random() < self.change

    def _value(self, hint: Any, path: str) -> Any:
        """A value of a type; `_DEFAULT` for types of which no value can be drawn."""
        if _listed(path) in SIZES:
            return self.random.choice(SIZES[_listed(path)])
        if path == "model.blocks":
            return self._blocks(path)
        if path == "recompute.blocks":
            return self.random.choice([[], ["first"], ["last"], ["first", "last"]])
        kinds = [kind for kind in (get_args(hint) or (hint,)) if isinstance(kind, type)]
        if get_origin(hint) is Literal:
            return self.random.choice(get_args(hint))
        if type(None) in kinds and self.random.random() < 0.4:
            return None
        if Schedule in kinds and self.random.random() < 0.3:
            return self._schedule(is_size=path == "batch.accumulate")
        nested = nested_section(hint, {})
        if get_origin(hint) is list and path.startswith("precision"):
            return self.random.choice(ROLE_PATTERNS)
        if nested and nested[1] == "one" and Schedule not in kinds:
            return self._section(nested[0], path, {})
        if bool in kinds:
            return self.random.random() < 0.5
        if int in kinds:
            return self.random.choice(WHOLE)
        if float in kinds and "accumulate" in path:
            return self.random.choice((1, 1, 2, 3))
        if float in kinds:
            return self.random.choice(REAL)
        return _DEFAULT

    def _blocks(self, path: str) -> dict[str, Any]:
        """One or two kinds of blocks."""
        from core.recipe.model_schema import BlockSection

        names = self.random.choice((["first"], ["first", "last"], ["first", "last"]))
        blocks = {}
        for name in names:
            section = self._section(BlockSection, f"{path}.*", {})
            section["count"] = self.random.choice(SIZES["model.blocks.*.count"])
            blocks[name] = section
        return blocks

    def _schedule(self, *, is_size: bool) -> dict[str, Any]:
        """A schedule of one or two segments."""
        unit = self.random.choice(
            ("steps", "tokens") if is_size else ("fraction", "steps", "tokens")
        )
        knots = {"fraction": (0.5, 1.0), "steps": (1, 2), "tokens": (8, 64)}[unit]
        segments = []
        for until in knots[: self.random.choice((1, 2))]:
            to = self.random.choice((1, 2)) if is_size else self.random.choice((0.0, 0.01, 0.1))
            shape = self.random.choice(("constant", "linear", "cosine"))
            segments.append({"shape": shape, "to": to, "until": until})
        start = 1 if is_size else self.random.choice((0.0, 0.01))
        return {"unit": unit, "start": start, "segments": segments}

    def _children(self, f: Field[Any], path: str, beside: Mapping[str, Any]) -> Any:
        """The components of a slot that a key holds; `beside` are the keys of the section drawn before."""
        slot = f.metadata["slot"]
        many = f.metadata["many"]
        if many == "list":
            served = self._names(slot)
            if "router" in beside and self.random.random() < 0.95:
                able = self._class("router", beside["router"]["name"]).capabilities
                served = [name for name in served if self._class(slot, name).needs <= able]
            count = self.random.choice((0, 1, 1, 2)) if served else 0
            return [self._component(slot, path, served) for _ in range(count)]
        if many == "mapping":
            names = self.random.choice((["main"], ["main"], ["main", "second"]))
            return {name: self._component(slot, path) for name in names}
        if f.default is None and self.random.random() < 0.6:
            return _DEFAULT
        return self._component(slot, path)

    def _component(
        self, slot: str, path: str, names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """A section of a component that needs no GPU; `names`: those to choose from."""
        name = self.random.choice(names or self._names(slot))
        component = self._class(slot, name)
        base = {key: value for key, value in component.example.items() if key != "name"}
        return {"name": name, **self._section(component.Config, path, base)}

    def _names(self, slot: str) -> list[str]:
        names = []
        for name in self.registry.names(slot):
            if "gpu_only" not in self._class(slot, name).capabilities:
                names.append(name)
        return names

    def _class(self, slot: str, name: str) -> Any:
        return self.registry.find(slot, name).load()[0]


_DEFAULT = object()


def write_fixed(folder: Path) -> Path:
    """Writes a tiny corpus and the file that every drawn recipe overrides; returns the file."""
    write_texts(folder / "texts", count=12, words=30)
    (folder / "texts" / "doc-10.txt").write_text("held out", encoding="utf-8")
    file = folder / "drawn.yaml"
    file.write_text(FIXED.format(texts=folder / "texts"), encoding="utf-8")
    return file
