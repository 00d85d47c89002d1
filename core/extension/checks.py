"""Checks of a plugin before it is used: its contract version, its hooks, and a component's class and `Config`.

A plugin that fails one of these checks would otherwise fail later, in the middle of a run or of another library, with a
message that names neither the plugin nor what to do.
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
    "paper": ((str,), "a string"),
    "caveat": ((str,), "a string"),
    "rejected_keys": ((Mapping,), "a dict from key to reason"),
    "traceable": ((bool,), "True or False"),
}


class PluginError(ValueError):
    """A rule that a plugin breaks; the message is complete without the name of the exception."""


class UnknownSlotError(PluginError, AttributeError):
    """A slot that a plugin names and that does not exist."""


def format_error(cause: BaseException) -> str:
    """Returns an exception as part of one sentence."""
    text = " ".join(str(cause).split())
    if isinstance(cause, PluginError):
        return text
    if isinstance(cause, SystemExit):
        return f"it exits Python when it is imported (SystemExit: {text})"
    message = _name_and_text(cause)
    if "circular import" in text:
        return f"{message}; two modules import each other: move what both need into a third"
    return message


def format_error_at(cause: BaseException) -> str:
    """Returns an exception and the line that raised it, for code that runs long after its module was imported."""
    message = _name_and_text(cause)
    frames = traceback.extract_tb(cause.__traceback__)
    if not frames:
        return message
    return f"{message} ({frames[-1].filename}, line {frames[-1].lineno})"


def _name_and_text(cause: BaseException) -> str:
    name = type(cause).__name__
    text = " ".join(str(cause).split())
    return f"{name}: {text}" if text else name


def check_plugin(module: ModuleType) -> None:
    """Checks that a module states a contract version that is offered here, and implements only hooks that exist.

    Raises:
        PluginError: it does not.
    """
    implemented = _implemented_hooks(module)
    if not implemented:
        raise PluginError(_no_hook(module))
    check_version(module)
    known = _known_hooks()
    for name, function in implemented.items():
        hook = getattr(function, f"{_PROJECT}_impl")["specname"] or name
        if hook not in known:
            raise PluginError(f"unknown hook {hook!r}; {nearest(hook, known)}")
        names = ", ".join(known[hook])
        for argument in _arguments(function):
            if argument not in known[hook]:
                right = f"`def {name}({names})`, with these names"
                raise PluginError(f"its hook {name} takes {argument!r}, but must be {right}")


def _implemented_hooks(module: ModuleType) -> dict[str, Any]:
    """The functions of a module that are marked with `hookimpl`, by name."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if inspect.isroutine(value) and hasattr(value, f"{_PROJECT}_impl"):
            found[name] = value
    return found


def _known_hooks() -> dict[str, list[str]]:
    """The argument names of every hook that a plugin may implement, by the hook's name."""
    known: dict[str, list[str]] = {}
    for name, hook in vars(Hooks).items():
        if hasattr(hook, f"{_PROJECT}_spec"):
            known[name] = _arguments(hook)
    return known


def check_version(module: ModuleType) -> None:
    """Checks that `CONTRACTS` has our major version and no later minor one.

    Raises:
        PluginError: it is missing, is not a version, or is another one.
    """
    name = module.__name__
    ours = contracts.VERSION
    line = f'write CONTRACTS = "{ours}" beside its register'
    if not hasattr(module, "CONTRACTS"):
        raise PluginError(f"{name} does not say which contracts it was built for; {line}")
    stated = module.CONTRACTS
    if not (isinstance(stated, str) and re.fullmatch(r"\d+\.\d+", stated)):
        raise PluginError(f"{name} states CONTRACTS = {stated!r}, which is not a version; {line}")
    major, minor = _version_numbers(stated)
    our_major, our_minor = _version_numbers(ours)
    if major != our_major or minor > our_minor:
        offered = ours if our_minor == 0 else f"{our_major}.0 up to {ours}"
        choice = f"install a moeloom that offers {stated}, or a release of the plugin for {offered}"
        if major < our_major:
            choice = f"its author finds what to change in docs/migration.md; {choice}"
        raise PluginError(
            f"{name} was built for contracts {stated}, and this moeloom offers {ours}; {choice}"
        )


def _version_numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def _no_hook(module: ModuleType) -> str:
    message = f"{module.__name__} implements no hook: it needs `@hookimpl def register(registry)`"
    functions = [name for name, value in vars(module).items() if isinstance(value, FunctionType)]
    near = get_close_matches("register", functions, n=1)
    if not near:
        return message
    if near == ["register"]:
        return f"{message}; its register is not marked"
    return f"{message}; is its {near[0]!r} meant?"


def _arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def check_component(component: type, slots: Collection[str]) -> None:
    """Checks that a component leaves nothing abstract and that its `Config` is a schema.

    Args:
        component: the class.
        slots: the names of all slots, which a `child` may name.

    Raises:
        PluginError: it breaks one of these rules.
    """
    if abstract := sorted(getattr(component, "__abstractmethods__", ())):
        raise PluginError(f"{component.__name__} does not implement {', '.join(abstract)}")
    for name, (kinds, words) in ATTRIBUTES.items():
        value = getattr(component, name)
        if not isinstance(value, kinds):
            raise PluginError(f"{component.__name__}.{name} must be {words}, not {value!r}")
    config = getattr(component, "Config", None)
    if not isinstance(config, type):
        raise PluginError(
            f"{component.__name__} has no Config: nest the schema, `@dataclass(kw_only=True) class Config`"
        )
    _check_schema(config, slots, set())


def _check_schema(config: type, slots: Collection[str], seen: set[Any]) -> None:
    who = config.__qualname__
    decorated = "__dataclass_params__" in vars(config) or not inspect.get_annotations(config)
    if not (is_dataclass(config) and decorated):
        raise PluginError(f"{who} is not a dataclass: write @dataclass(kw_only=True) above it")
    try:
        hints = get_type_hints(config)
    except Exception as cause:
        raise PluginError(f"{who}: its types cannot be read: {format_error(cause)}") from cause
    seen.add(config)
    for f in fields(config):
        _check_field(f, hints[f.name], f"{who}.{f.name}", slots)
        for inner in _dataclasses(hints[f.name]):
            if inner not in seen and not inner.__module__.startswith("core.contracts."):
                _check_schema(inner, slots, seen)
    for name in _untyped(config):
        raise PluginError(
            f"{who}.{name} has no type, so no recipe can set it: write `{name}: TYPE = setting(..., doc=...)`"
        )


def _check_field(f: "Field[Any]", hint: Any, who: str, slots: Collection[str]) -> None:
    if not (f.kw_only and f.init):
        raise PluginError(
            f"{who} must be a keyword-only argument: write @dataclass(kw_only=True), and no init=False"
        )
    if f.name == "name":
        raise PluginError(
            f"{who}: a section's `name` says which component it is, so no key may have that name"
        )
    doc = f.metadata.get("doc")
    if not (isinstance(doc, str) and doc.strip()):
        line = f"{f.name}: {_type_name(hint)} = setting(..., doc=...)"
        raise PluginError(f"{who} does not say what it means: write `{line}`")
    if "slot" not in f.metadata:
        if not _allowed(hint):
            found = f"{who} is of type {_type_name(hint)}, which no recipe can hold"
            raise PluginError(f"{found}; allowed: {ALLOWED}")
        return
    slot = f.metadata["slot"]
    many = f.metadata.get("many")
    if slot not in slots:
        raise PluginError(f"{who}: there is no slot {slot!r}; {nearest(str(slot), slots)}")
    if many not in ("one", "list", "mapping"):
        raise PluginError(f"{who}: children come as 'list' or 'mapping', not {many!r}")


def _allowed(hint: Any) -> bool:
    """Whether a recipe can hold a value of this type, as a plain value or as a section."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if is_dataclass(hint):
        return True
    if origin is list or (origin is dict and arguments[0] is str):
        return is_dataclass(arguments[-1]) or _plain(arguments[-1])
    if origin in (Union, UnionType):
        sections = [a for a in arguments if is_dataclass(a)]
        others = [a for a in arguments if a not in sections]
        return len(sections) <= 1 and all(map(_plain, others))
    return _plain(hint)


def _plain(hint: Any) -> bool:
    """Whether YAML has values of this type."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Literal:
        return all(isinstance(a, PLAIN[:-1]) for a in arguments)
    if origin in (Union, UnionType):
        return all(map(_plain, arguments))
    if origin is list:
        return _plain(arguments[0])
    if origin is dict:
        return arguments[0] is str and _plain(arguments[1])
    return any(hint is kind for kind in (*PLAIN, list, dict))


def _dataclasses(hint: Any) -> Iterator[Any]:
    """The dataclasses inside a type."""
    if is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from _dataclasses(argument)


def _untyped(config: type) -> Iterable[str]:
    """The names of public values in a schema that are neither keys, because they have no type, nor methods."""
    known = {f.name for f in fields(config)} | set(inspect.get_annotations(config))  # type: ignore[arg-type]
    for name, value in vars(config).items():
        if name.startswith("_") or name in known or isinstance(value, METHODS):
            continue
        if not (isinstance(value, FunctionType) and _takes_self(value)):
            yield name


def _takes_self(function: FunctionType) -> bool:
    return next(iter(inspect.signature(function).parameters), "") == "self"


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        if hint.__module__ == "builtins":
            return hint.__qualname__
        return f"{hint.__module__}.{hint.__qualname__}"
    return str(hint).replace("typing.", "")
