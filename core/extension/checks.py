"""What is asked of a plugin before it is let in: its contract version and hooks, and a component's class and `Config`.

A plugin that fails one of these would fail later, in the middle of a run or of another library, in words that name
neither the plugin nor what to do.
"""

import inspect
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cached_property
from types import FunctionType, ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from core import contracts
from core.contracts.errors import nearest
from core.extension.hookspec import Hooks

PLAIN = (int, float, bool, str, NoneType, Any)
ALLOWED = (
    "int, float, bool, str, None, Any, Literal[...], list[...] or dict[str, ...] of these, their unions, Scheduled, "
    "or a dataclass with keys of its own; another component is a child(slot, doc=...)"
)
_PROJECT = "moeloom"
METHODS = (property, cached_property, classmethod, staticmethod, type)
ATTRIBUTES: dict[str, tuple[tuple[type, ...], str]] = {
    "capabilities": ((frozenset, set), "a frozenset of words"),
    "example": ((dict,), "a dict, the component's section in a recipe"),
    "paper": ((str,), "a text"),
    "notice": ((str,), "a text"),
    "refuses": ((Mapping,), "a dict from key to reason"),
    "traceable": ((bool,), "True or False"),
}


class Mistake(ValueError):  # noqa: N818 - the end of a sentence
    """What is wrong with a plugin, in words that need no name of an exception before them."""


class NoSlot(Mistake, AttributeError):  # noqa: N818
    """A plugin names a slot that there is not."""


def told(cause: BaseException) -> str:
    """An exception as part of one sentence."""
    text = " ".join(str(cause).split())
    if isinstance(cause, Mistake):
        return text
    if isinstance(cause, SystemExit):
        return f"it leaves Python when it is imported (SystemExit: {text})"
    hint = "; two modules import each other: move what both need into a third" if "circular import" in text else ""
    return f"{type(cause).__name__}: {text}{hint}" if text else type(cause).__name__


def told_where(cause: BaseException) -> str:
    """An exception and the line that raised it, for what is called long after its module was imported."""
    frames = traceback.extract_tb(cause.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}{': ' if text else ''}{text}{where}"


def check_plugin(module: ModuleType) -> None:
    """A module states a contract version that is offered here, and implements the hooks that there are.

    Raises:
        Mistake: it does not.
    """
    found = {
        name: value
        for name, value in vars(module).items()
        if inspect.isroutine(value) and hasattr(value, f"{_PROJECT}_impl")
    }
    if not found:
        raise Mistake(_no_hook(module))
    check_version(module)
    known = {name: _arguments(hook) for name, hook in vars(Hooks).items() if hasattr(hook, f"{_PROJECT}_spec")}
    for name, function in found.items():
        hook = getattr(function, f"{_PROJECT}_impl")["specname"] or name
        if hook not in known:
            raise Mistake(f"it implements the hook {hook!r}, which there is not; {nearest(hook, known)}")
        for argument in _arguments(function):
            if argument not in known[hook]:
                names = ", ".join(known[hook])
                raise Mistake(
                    f"its hook {name} takes {argument!r}, but must read `def {name}({names})`, by these names"
                )


def check_version(module: ModuleType) -> None:
    """`CONTRACTS` has our major and no later minor.

    Raises:
        Mistake: it is missing, no version, or another one.
    """
    name, ours = module.__name__, contracts.VERSION
    line = f'write CONTRACTS = "{ours}" beside its register'
    if not hasattr(module, "CONTRACTS"):
        raise Mistake(f"{name} does not say which contracts it was built for; {line}")
    stated = module.CONTRACTS
    if not (isinstance(stated, str) and re.fullmatch(r"\d+\.\d+", stated)):
        raise Mistake(f"{name} states CONTRACTS = {stated!r}, which is no version; {line}")
    (major, minor), (our_major, our_minor) = (map(int, version.split(".")) for version in (stated, ours))
    if major != our_major or minor > our_minor:
        known = ours if our_minor == 0 else f"{our_major}.0 up to {ours}"
        choice = f"install a moeloom that offers {stated}, or a release of the plugin for {known}"
        if major < our_major:
            choice = f"its author finds what to change in docs/migration.md; {choice}"
        raise Mistake(f"{name} was built for contracts {stated}, and this moeloom offers {ours}; {choice}")


def _no_hook(module: ModuleType) -> str:
    told = f"{module.__name__} implements no hook: it needs `@hookimpl def register(registry)`"
    functions = [name for name, value in vars(module).items() if isinstance(value, FunctionType)]
    near = get_close_matches("register", functions, n=1)
    if not near:
        return told
    return f"{told}; {'its register is not marked' if near == ['register'] else f'is its {near[0]!r} meant?'}"


def _arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def check_component(component: type, slots: Collection[str]) -> None:
    """A component leaves nothing abstract, and its `Config` is a schema.

    Raises:
        Mistake: it is not so.
    """
    if abstract := sorted(getattr(component, "__abstractmethods__", ())):
        raise Mistake(f"{component.__name__} does not implement {', '.join(abstract)}")
    for name, (kinds, words) in ATTRIBUTES.items():
        if not isinstance(value := getattr(component, name), kinds):
            raise Mistake(f"{component.__name__}.{name} must be {words}, not {value!r}")
    config = getattr(component, "Config", None)
    if not isinstance(config, type):
        raise Mistake(f"{component.__name__} has no Config: nest the schema, `@dataclass(kw_only=True) class Config`")
    _check_schema(config, slots, set())


def _check_schema(config: type, slots: Collection[str], seen: set[Any]) -> None:
    who = config.__qualname__
    if not is_dataclass(config) or ("__dataclass_params__" not in vars(config) and inspect.get_annotations(config)):
        raise Mistake(f"{who} is no dataclass: write @dataclass(kw_only=True) above it")
    try:
        hints = get_type_hints(config)
    except Exception as cause:
        raise Mistake(f"{who}: its types cannot be read: {told(cause)}") from cause
    seen.add(config)
    for f in fields(config):
        _check_field(f, hints[f.name], f"{who}.{f.name}", slots)
        for inner in _dataclasses(hints[f.name]):
            if inner not in seen and not inner.__module__.startswith("core.contracts."):
                _check_schema(inner, slots, seen)
    for name in _forgotten(config):
        raise Mistake(
            f"{who}.{name} has no type, so no recipe can set it: write `{name}: TYPE = setting(..., doc=...)`"
        )


def _check_field(f: "Field[Any]", hint: Any, who: str, slots: Collection[str]) -> None:
    if not (f.kw_only and f.init):
        raise Mistake(f"{who} cannot be given by its name alone: write @dataclass(kw_only=True), and no init=False")
    if f.name == "name":
        raise Mistake(f"{who}: a section's `name` says which component it is, so no key is called so")
    doc = f.metadata.get("doc")
    if not (isinstance(doc, str) and doc.strip()):
        raise Mistake(f"{who} does not say what it means: write `{f.name}: {_shown(hint)} = setting(..., doc=...)`")
    if "slot" in f.metadata:
        if f.metadata["slot"] not in slots:
            raise Mistake(f"{who}: there is no slot {f.metadata['slot']!r}; {nearest(str(f.metadata['slot']), slots)}")
        if f.metadata.get("many") not in ("one", "list", "mapping"):
            raise Mistake(f"{who}: children come as 'list' or 'mapping', not {f.metadata.get('many')!r}")
    elif not _allowed(hint):
        raise Mistake(f"{who} is of type {_shown(hint)}, which no recipe can hold; allowed: {ALLOWED}")


def _allowed(hint: Any) -> bool:
    """Whether a recipe can hold it, as a value or as a section."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return True
    if origin is list or (origin is dict and arguments[0] is str):
        return is_dataclass(arguments[-1]) or _plain(arguments[-1])
    if origin in (Union, UnionType):
        sections = [a for a in arguments if is_dataclass(a)]
        return len(sections) <= 1 and all(_plain(a) for a in arguments if a not in sections)
    return _plain(hint)


def _plain(hint: Any) -> bool:
    """Whether YAML has a value for it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return all(isinstance(a, PLAIN[:-1]) for a in arguments)
    if origin in (Union, UnionType):
        return all(_plain(a) for a in arguments)
    if origin is list:
        return _plain(arguments[0])
    if origin is dict:
        return arguments[0] is str and _plain(arguments[1])
    return any(hint is kind for kind in (*PLAIN, list, dict))


def _dataclasses(hint: Any) -> Iterator[Any]:
    if is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)


def _forgotten(config: type) -> Iterable[str]:
    """Public values of a schema that are neither its keys nor its methods."""
    known = {f.name for f in fields(config)} | set(inspect.get_annotations(config))  # type: ignore[arg-type]
    for name, value in vars(config).items():
        if name.startswith("_") or name in known or isinstance(value, METHODS):
            continue
        if not (isinstance(value, FunctionType) and next(iter(inspect.signature(value).parameters), "") == "self"):
            yield name


def _shown(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        return hint.__qualname__ if hint.__module__ == "builtins" else f"{hint.__module__}.{hint.__qualname__}"
    return str(hint).replace("typing.", "")
