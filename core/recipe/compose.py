"""Finds a recipe, merges its layers, and resolves the result.

The layers, each merged over the one before: the file that it `extends`, the file itself, its `smoke` section if that is
requested, and the command line's `KEY.PATH=VALUE`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from core.command import search_current_folder
from core.contracts.errors import UserError, nearest
from core.contracts.schema import REQUIRED
from core.extension.loader import installed_registry, registry_for
from core.recipe.key_paths import to_dict
from core.recipe.own_paths import locate_own_paths
from core.recipe.recipe_layers import Layers, leaves, with_string_keys
from core.recipe.recipe_schema import RecipeSchema
from core.recipe.resolve import Resolver
from core.recipe.shipped import find_recipe, is_shipped, shipped_file
from core.recipe.sources import SMOKE, Sources, smoke_of
from core.recipe.tokenizer_file import with_tokenizer_file
from core.recipe.trainer_keys import FREE_TRAINER_KEYS, OWNED_TRAINER_KEYS
from core.recipe.trust import check_run_links, is_of_a_run
from core.recipe.values import environment_hidden, omegaconf_message
from core.storage.digests import warn_if_edited
from core.storage.documents import TOO_DEEP, read_yaml


@dataclass(kw_only=True)
class Recipe(RecipeSchema):
    """A validated recipe and where it comes from.

    Args:
        name: the file's name without its ending.
        source: the file.
        dropped: keys that were left out, because a changed `name` selects a component that does not have them.
        caveats: what readers of its results must know beside the caveats of its components.
    """

    name: str = ""
    source: str = ""
    dropped: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    def notices(self) -> list[str]:
        """Returns the caveats of the recipe and of its components, each once."""
        return list(dict.fromkeys([*self.caveats, *super().notices()]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain containers; composing it again gives the same recipe."""
        values: dict[str, Any] = to_dict(self)
        for key in ("name", "source", "dropped", "caveats"):
            del values[key]
        return values


def compose(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    smoke: bool = False,
    trust: bool = False,
    check_source: bool = False,
) -> Recipe:
    """Reads, extends, overrides, resolves and validates a recipe.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: `KEY.PATH=VALUE` each; list items as `balance.0.rate=0.01`.
        smoke: whether the recipe's `smoke` section is merged over it.
        trust: whether a file of a run that this machine has not made may name modules in `plugins`, which then run.
        check_source: whether the corpus checks that its text is there.

    Raises:
        UserError: something in the recipe or the overrides is wrong; the message is one sentence.
    """
    sources = Sources(trust=trust)
    return _compose(find_recipe(path), overrides, sources, smoke=smoke, check_source=check_source)


def compose_run(
    file: Path,
    overrides: Iterable[str] = (),
    *,
    trust: bool = False,
    named: Collection[str] = (),
    check_source: bool = False,
) -> Recipe:
    """Composes the recipe in a run folder, whatever else the folder holds.

    Args:
        file: the run's `recipe.yaml`.
        overrides: `KEY.PATH=VALUE` each, from the command line.
        trust: whether the recipe may name modules that this machine has not recorded, and links may lead elsewhere.
        named: modules that the user's own recipe names, so that this one may name them too.
        check_source: whether the corpus checks that its text is there.

    Raises:
        UserError: something in the recipe is wrong, it names a module that may not run, or a link leads out of the run
            folder and the run is not trusted.
    """
    if not trust:
        check_run_links(file)
    warn_if_edited(file)
    sources = Sources(trust=trust, of_a_run=True, named=named)
    return _compose(find_recipe(file), overrides, sources, check_source=check_source)


def compose_variant(
    file: Path, overrides: Iterable[str], sweep: Path, *, smoke: bool = False, trust: bool = False
) -> Recipe:
    """Composes a variant of a sweep, whose file chooses the recipe and the overrides.

    Args:
        file: the recipe.
        overrides: `KEY.PATH=VALUE` each, from the sweep's file.
        sweep: the sweep's file.
        smoke: whether the recipe's `smoke` section is merged over it.
        trust: whether files of runs and sweeps that were made elsewhere may name modules.

    Raises:
        UserError: something is wrong, or a module may not run.
    """
    sources = Sources(trust=trust, overrides_folder=sweep.parent)
    if is_of_a_run(sweep):
        sources.of_a_run = not is_shipped(file)
        sources.overrides_from = sweep
    return _compose(file, overrides, sources, smoke=smoke)


def _compose(
    file: Path,
    overrides: Iterable[str],
    sources: Sources,
    *,
    smoke: bool = False,
    check_source: bool = False,
) -> Recipe:
    layers = Layers(str(file))
    own = _read(file)
    sources.add(file, of_a_run=sources.of_a_run)
    if "extends" in own:
        values, base = _base(file, own.pop("extends"))
        layers.add(values, str(base))
        sources.add_base(base, file)
    layers.add(own, str(file))
    section = layers.values.get("smoke", {})
    if isinstance(section, dict) and "extends" in section:
        raise UserError(f"{file}: smoke.extends: only a file can extend another")
    if smoke and isinstance(section, dict):
        sources.add_smoke(file, layers)
        layers.add(section, smoke_of(file))
    layers.override(overrides)
    sources.locate_plugin_files(layers)
    locate_own_paths(layers, SMOKE)
    sources.check_plugins(layers)
    return _resolve(file, layers, check_source=check_source)


def _resolve(file: Path, layers: Layers, check_source: bool) -> Recipe:
    """The validated recipe of merged layers."""
    values = with_tokenizer_file(_interpolated(layers), layers)
    _check_trainer(values.get("trainer"), layers)
    # the core's own keys, then the names, then components: an error in a key of the core needs no import of torch
    resolver = Resolver(
        installed_registry(),
        layers.origin,
        layers.inherited,
        defer=True,
        check_source=check_source,
    )
    core = resolver.section(RecipeSchema, values, "", beside=["extends"])
    if not installed_registry().modules().issuperset(core.plugins):
        search_current_folder()
    try:
        registry = registry_for(core.plugins)
    except UserError as cause:
        raise UserError(f"{layers.origin('plugins')}: plugins: {cause}") from cause
    resolver.read_components(registry, core)
    own = {key: getattr(core, key) for key in RecipeSchema.__dataclass_fields__}
    dropped = tuple(dict.fromkeys(resolver.dropped))
    return Recipe(**own, name=file.stem, source=str(file), dropped=dropped)


def _check_trainer(trainer: Any, layers: Layers) -> None:
    """Raises `UserError` for a key of `trainer` that the recipe sets elsewhere, or that does not exist."""
    if not isinstance(trainer, Mapping):
        return
    for key in trainer:
        where = f"{layers.origin(f'trainer.{key}')}: trainer.{key}"
        if key in OWNED_TRAINER_KEYS:
            raise UserError(
                f"{where}: another key of the recipe sets this; use {OWNED_TRAINER_KEYS[key]}"
            )
        if key not in FREE_TRAINER_KEYS:
            raise UserError(f"{where}: unknown key; {nearest(str(key), FREE_TRAINER_KEYS)}")


def _interpolated(layers: Layers) -> dict[str, Any]:
    """The values with every `${other.key}` replaced; no value may be missing."""
    with environment_hidden() as hidden:
        try:
            values = OmegaConf.to_container(OmegaConf.create(layers.values), resolve=True)
        except OmegaConfBaseException as cause:
            path = cause.full_key or ""
            message = omegaconf_message(cause)
            why = f"cannot be worked out: {message}"
            if isinstance(cause, InterpolationKeyError):
                why = f"refers to a key that the recipe does not hold ({message})"
            if hidden:
                why = hidden[0]
            raise UserError(f"{layers.origin(_dotted(path))}: {path}: {why}") from cause
    if hidden:  # another resolver has caught the error
        raise UserError(f"{layers.origin('')}: {hidden[0]}")
    assert isinstance(values, dict)
    for path, value in leaves(values):
        if value == REQUIRED:
            why = f"a value must be given in place of {REQUIRED}"
            raise UserError(f"{layers.origin(path)}: {path}: {why}")
    return {str(key): value for key, value in values.items()}


def _dotted(path: str) -> str:
    """A key path as the origins have it: `a.0` where OmegaConf writes `a[0]`."""
    return path.replace("[", ".").replace("]", "")


def _base(file: Path, extends: Any) -> tuple[dict[str, Any], Path]:
    """The values and the path of the file that `file` extends."""
    if not isinstance(extends, str) or not extends:
        shown = "null" if extends is None else repr(extends)
        raise UserError(f"{file}: extends = {shown}: must be the name of one file")
    beside = file.parent / extends
    where = f"{file}: extends = {extends!r}: "
    base = beside if beside.is_file() else shipped_file(extends, where)
    if base.suffix not in (".yaml", ".yml"):
        raise UserError(f"{where}must be a recipe file, whose name ends in .yaml or .yml")
    values = _read(base)
    if "extends" in values:
        raise UserError(f"{where}that file extends another one, and only one level is allowed")
    return values, base


def _read(file: Path) -> dict[str, Any]:
    """The values of a YAML file, which must be a mapping."""
    text = read_yaml(file, RecipeSchema.__dataclass_fields__)
    try:
        values = with_string_keys(OmegaConf.to_container(OmegaConf.load(StringIO(text))))
    except RecursionError as cause:
        raise UserError(f"{file}: {TOO_DEEP}") from cause
    except yaml.MarkedYAMLError as cause:
        where = str(file)
        mark = cause.problem_mark or cause.context_mark
        if mark:
            where = f"{file}, line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{where}: cannot be read: {cause.problem or cause.context}") from cause
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, TypeError) as cause:
        raise UserError(f"{file}: cannot be read: {omegaconf_message(cause)}") from cause
    if not isinstance(values, dict):
        keys = ", ".join(RecipeSchema.__dataclass_fields__)
        raise UserError(f"{file}: must be a section of keys: {keys}")
    return values
