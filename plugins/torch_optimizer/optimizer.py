"""The component `torch`: an optimizer of torch.optim, with groups of weights that have settings of their own."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from core.contracts.bounds import positive
from core.contracts.errors import ConfigError, nearest
from core.contracts.schedule import LearningRateSettings
from core.contracts.schema import setting
from core.contracts.training import NamedParameter, OptimizerFactory
from plugins.torch_optimizer.arguments import (
    ELEMENTWISE,
    check_algorithm,
    check_arguments,
    in_torchs_form,
    make,
)
from plugins.torch_optimizer.trial import KeptTensor, kept_states

PATTERNS = ("names", "roles", "kinds")
"""The keys of a group that choose weights."""

WHOLE_OPTIMIZER = ("foreach", "fused")
"""Arguments that choose the implementation, which is one for all groups of an optimizer."""

REST = -1
"""The number of the group of all weights that no group names."""


@dataclass(kw_only=True)
class GroupSection:
    """Weights with settings of their own: those that any of the patterns names."""

    names: list[str] = setting([], doc="patterns of names in the state dict, such as *.norm.weight")
    roles: list[str] = setting([], doc="patterns of roles, such as attention.*")
    kinds: list[Literal["matrix", "stack", "vector", "table"]] = setting(
        [], doc="forms of weights: matrix, stack (one for each expert), vector, table (embedding)"
    )
    lr_scale: float = setting(1.0, doc="factor of the learning rate of these weights")
    algorithm: str | None = setting(
        None, doc="another class of torch.optim for them; null: the optimizer's"
    )
    arguments: dict[str, Any] = setting(
        {}, doc="arguments that differ from the optimizer's, or those of `algorithm`"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a group that can hold no weight, and for a rate that is not positive."""
        if not (self.names or self.roles or self.kinds):
            raise ConfigError("names", "names, roles or kinds must say which weights it holds")
        positive(self, "lr_scale")


class TorchOptimizer(OptimizerFactory):
    """A class of torch.optim by name; weights can be in groups with other arguments, rates or classes."""

    paper = "https://pytorch.org/docs/stable/optim.html"
    example = {"name": "torch", "algorithm": "AdamW", "lr": 0.001}

    @dataclass(kw_only=True)
    class Config(LearningRateSettings):
        """The class, its arguments, and groups of weights."""

        algorithm: str = setting(doc="a class of torch.optim, such as AdamW, SGD or NAdam")
        arguments: dict[str, Any] = setting(
            {}, doc="arguments of its constructor; torch's defaults are those of all others"
        )
        groups: list[GroupSection] = setting([], doc="weights with settings of their own")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for classes and arguments that torch does not have or take."""
            super().check(parent)
            check_algorithm("algorithm", self.algorithm)
            check_arguments("arguments", self.algorithm, self.arguments)
            for number, group in enumerate(self.groups):
                key = f"groups.{number}"
                if group.algorithm is not None:
                    check_algorithm(f"{key}.algorithm", group.algorithm)
                elif shared := [name for name in WHOLE_OPTIMIZER if name in group.arguments]:
                    why = "is one for all groups; give it in optimizer.arguments"
                    raise ConfigError(f"{key}.arguments.{shared[0]}", why)
                # the group's own first, so that an error names its key
                algorithm = group.algorithm or self.algorithm
                check_arguments(f"{key}.arguments", algorithm, group.arguments)
                merged = arguments_of(self, number)
                check_arguments(f"{key}.arguments", algorithm, merged)

    @classmethod
    def needs_whole_of(cls, config: Any) -> bool:
        """Whether a class is used that is not known to update each number by itself."""
        numbers = [REST, *range(len(config.groups))]
        return any(algorithm_of(config, number) not in ELEMENTWISE for number in numbers)

    def check_parameters(self, parameters: Sequence[NamedParameter]) -> None:
        """Raises `ConfigError` for patterns without weights, and weights of two groups or of a wrong class."""
        for number, group in enumerate(self.config.groups):
            _check_patterns(f"groups.{number}", group, parameters)
        for named in parameters:
            found = [n for n, group in enumerate(self.config.groups) if _holds(group, named)]
            if len(found) > 1:
                why = f"{named.name} is in groups.{found[0]} too; a weight must be in one group"
                raise ConfigError(f"groups.{found[1]}", why)
            self._check_weight(named)

    def _check_weight(self, named: NamedParameter) -> None:
        """Raises `ConfigError` for a weight that its class cannot update, or whose state cannot be saved."""
        number = self._group_of(named)
        key = "algorithm" if number == REST else f"groups.{number}.algorithm"
        algorithm = algorithm_of(self.config, number)
        try:
            _, strange = self._kept(number, named.parameter.ndim)
        except (ValueError, RuntimeError) as error:
            # what follows in Muon's message is the size of the trial's weight
            why = " ".join(str(error).split()).partition(" whereas ")[0][:160]
            raise ConfigError(key, f"{algorithm} cannot update {named.name}: {why}") from error
        if strange:
            what = f"it keeps {strange[0]}, which is neither a tensor nor a number"
            raise ConfigError(key, f"{algorithm} cannot be saved in a checkpoint: {what}")

    def _group_of(self, named: NamedParameter) -> int:
        """The number of the group that holds a weight; `REST` if none names it."""
        for number, group in enumerate(self.config.groups):
            if _holds(group, named):
                return number
        return REST

    def _kept(self, number: int, axes: int) -> tuple[list[KeptTensor], list[str]]:
        """What the class of a group keeps for a weight of so many axes."""
        arguments = json.dumps(arguments_of(self.config, number), sort_keys=True)
        return _tried(algorithm_of(self.config, number), arguments, axes)

    def make(self, parameters: Sequence[NamedParameter]) -> list[Optimizer]:
        """The optimizer, and one more for each group with a class of its own."""
        weights: dict[int, list[Tensor]] = {}
        for named in parameters:
            weights.setdefault(self._group_of(named), []).append(named.parameter)
        shared = []
        made: list[Optimizer] = []
        for number in sorted(weights):
            group = self._torchs_group(number, weights[number])
            if number != REST and self.config.groups[number].algorithm is not None:
                made.append(self._optimizer(number, [group]))
            else:
                shared.append(group)
        if shared:
            made.insert(0, self._optimizer(REST, shared))
        return made

    def _torchs_group(self, number: int, weights: list[Tensor]) -> dict[str, Any]:
        """A group of weights as torch's optimizers take them."""
        group: dict[str, Any] = {"params": weights}
        if number == REST:
            return group
        section = self.config.groups[number]
        group |= in_torchs_form(section.arguments)
        if section.lr_scale != 1:
            group["lr_scale"] = section.lr_scale
        return group

    def _optimizer(self, number: int, groups: list[dict[str, Any]]) -> Optimizer:
        """An optimizer with the class and the arguments of a group."""
        optimizer = make(
            algorithm_of(self.config, number), groups, arguments_of(self.config, number)
        )
        keep_formats(optimizer)
        return optimizer

    def state_bytes_of(self, named: NamedParameter) -> int:
        """The bytes of the tensors that the weight's class keeps; scalars count as one number each."""
        kept, _ = self._kept(self._group_of(named), named.parameter.ndim)
        return sum(tensor.bytes_for(named.parameter) for tensor in kept)


def algorithm_of(config: Any, number: int) -> str:
    """The class that updates the weights of a group."""
    own = None if number == REST else config.groups[number].algorithm
    algorithm: str = own or config.algorithm
    return algorithm


def arguments_of(config: Any, number: int) -> dict[str, Any]:
    """The arguments of a group: its own, over those of the optimizer unless it has another class."""
    if number == REST:
        return dict(config.arguments)
    group = config.groups[number]
    if group.algorithm is not None:
        return dict(group.arguments)
    return {**config.arguments, **group.arguments}


@cache
def _tried(algorithm: str, arguments: str, axes: int) -> tuple[list[KeptTensor], list[str]]:
    return kept_states(algorithm, json.loads(arguments), axes)


def _holds(group: GroupSection, named: NamedParameter) -> bool:
    """Whether some pattern of a group names a weight."""
    return any(fnmatchcase(value, pattern) for value, pattern in _pairs(group, named))


def _pairs(group: GroupSection, named: NamedParameter) -> Iterator[tuple[str, str]]:
    """Yields what a weight has for each pattern of a group, with the pattern."""
    for key, value in _values(named).items():
        for pattern in getattr(group, key):
            yield value, pattern


def _values(named: NamedParameter) -> dict[str, str]:
    """What the patterns of each key are compared with."""
    return {"names": named.name, "roles": named.role, "kinds": named.kind}


def _check_patterns(key: str, group: GroupSection, parameters: Sequence[NamedParameter]) -> None:
    """Raises `ConfigError` for a pattern that names no weight of the model."""
    for what in PATTERNS:
        known = sorted({_values(named)[what] for named in parameters} - {""})
        for pattern in getattr(group, what):
            if any(fnmatchcase(value, pattern) for value in known):
                continue
            shown = nearest(pattern, known) if what != "names" else _nearest_name(pattern, known)
            raise ConfigError(f"{key}.{what}", f"{pattern!r} names no weight; {shown}")


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The nearest names of weights; all of them would be too many."""
    guess, question, _ = nearest(pattern, names).partition("? ")
    if question:
        return f"{guess}?"
    return f"names are, for example, {', '.join(names[:3])}"


def keep_formats(optimizer: Optimizer) -> None:
    """Makes states that are loaded what they were: torch casts those with fractions to the format of their weight."""
    formats: dict[tuple[Any, str], torch.dtype] = {}

    def note(_: Optimizer, state: Mapping[str, Any]) -> None:
        formats.clear()
        for index, kept in state["state"].items():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    formats[index, name] = value.dtype

    def restore(loaded: Optimizer) -> None:
        weights: list[Tensor] = []
        for group in loaded.param_groups:
            weights += group["params"]
        for (index, name), dtype in formats.items():
            state = loaded.state[weights[index]]
            state[name] = state[name].to(dtype)

    optimizer.register_load_state_dict_pre_hook(note)
    optimizer.register_load_state_dict_post_hook(restore)
