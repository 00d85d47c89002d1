"""Finds what a folder of task files would run: a task of lm-evaluation-harness can be a program.

The files are read as the harness reads them, except that nothing is built from them. The harness's own tasks belong to
an installed distribution and are not looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

PLAIN_TAG = "tag:yaml.org,2002:"
"""The beginning of the tags of YAML's own types; any other tag makes an object, as `!function` does."""

FREE_KEYS = frozenset({"metadata", "samples"})
"""Sections of a task that may hold any keys."""

PICKLED = frozenset({"iceberg", "pandas"})
"""Builders of the library `datasets` that load pickles, or import what their arguments name."""

TEMPLATE_MARKS = ("{{", "{%", "{#")

FILTERS = frozenset(
    [
        "capitalize",
        "first",
        "int",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "replace",
        "string",
        "title",
        "trim",
        "upper",
    ]
)
"""Filters that a template may use without `--trust`."""

METHODS = frozenset(
    [
        "capitalize",
        "endswith",
        "index",
        "join",
        "lower",
        "lstrip",
        "replace",
        "rstrip",
        "split",
        "startswith",
        "strip",
        "title",
        "upper",
    ]
)
"""Methods of texts and lists that a template may call without `--trust`."""

TEMPLATE_NODES = frozenset(
    [
        "Add",
        "And",
        "Call",
        "Compare",
        "Concat",
        "CondExpr",
        "Const",
        "Filter",
        "Getattr",
        "Getitem",
        "If",
        "List",
        "Name",
        "Neg",
        "Not",
        "Operand",
        "Or",
        "Output",
        "Slice",
        "Sub",
        "Template",
        "TemplateData",
        "Test",
        "Tuple",
    ]
)
"""Parts of a template, as Jinja names them, that only put fields together."""


@dataclass(frozen=True)
class Finding:
    """Something in a task file that runs code.

    Args:
        file: the task file.
        key: the key whose value runs code.
        value: the value.
    """

    file: Path
    key: str
    value: str

    def __str__(self) -> str:
        shown = self.value if len(self.value) <= 80 else f"{self.value[:77]}..."
        return f"{self.file}: {self.key} = {shown!r}"


def find_code(folder: Path) -> list[Finding]:
    """Returns everything that the task files of a folder, and the files that they include, would run."""
    reader = _Reader(_harness_folder())
    for file in sorted(folder.glob("**/*.yaml")):
        reader.read(file)
    return reader.findings


def _harness_folder() -> Path | None:
    """The folder of the installed harness; None if it is not installed."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).resolve()


class _Reader:
    """Reads task files, each once.

    Args:
        harness: the folder of the installed harness, whose files may run.
    """

    def __init__(self, harness: Path | None) -> None:
        self.harness = harness
        self.findings: list[Finding] = []
        self._files: set[Path] = set()
        self._nodes: set[int] = set()

    def read(self, file: Path) -> None:
        """Reads a file and those that it includes; the harness skips what is no YAML, and so does this."""
        place = file.resolve()
        if place in self._files:
            return
        self._files.add(place)
        if self.harness is not None and place.is_relative_to(self.harness):
            return
        try:
            with place.open("rb") as stream:
                root = yaml.compose(stream, Loader=_loader())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return
        self._nodes.clear()
        if root is not None:
            self._walk(file, root, ())

    def _walk(self, file: Path, node: yaml.Node, keys: tuple[str, ...]) -> None:
        """Looks at a value and all that it holds; an alias may lead back to what was seen."""
        if id(node) in self._nodes and not isinstance(node, yaml.ScalarNode):
            return
        self._nodes.add(id(node))
        key = keys[-1] if keys else ""
        if not node.tag.startswith(PLAIN_TAG) or "python" in node.tag:
            self._add(file, key, f"{node.tag} {_text(node)}".strip())
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                self._walk(file, name, keys)
                self._walk(file, value, (*keys, _text(name)))
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._walk(file, item, keys)
        else:
            self._check(file, keys, node)

    def _check(self, file: Path, keys: tuple[str, ...], node: yaml.Node) -> None:
        """Looks at a plain value."""
        text = _text(node)
        key = keys[-1] if keys else ""
        if key == "include":
            self._include(file, text)
        elif any(mark in text for mark in TEMPLATE_MARKS):
            if not is_plain_template(text):
                self._add(file, key, text)
        elif not FREE_KEYS & set(keys) and _runs(keys, text):
            self._add(file, key, text)

    def _include(self, file: Path, text: str) -> None:
        seen = set(self._nodes)
        self.read(file.resolve().parent / text)
        self._nodes = seen

    def _add(self, file: Path, key: str, value: str) -> None:
        finding = Finding(file, key, value)
        if finding not in self.findings:
            self.findings.append(finding)


def _loader() -> Any:
    """The loader that the harness builds upon; of it only the parser is used here."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _text(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def _runs(keys: tuple[str, ...], text: str) -> bool:
    """Whether the value of a key makes the harness run code from elsewhere."""
    key = keys[-1] if keys else ""
    if text.lower() in ("", "false", "no", "off", "null", "~"):
        return False
    if key in ("class", "custom_dataset", "hf_evaluate", "trust_remote_code", "use_prompt"):
        return True
    if key == "dataset_path":
        folder = Path(text)
        return text.endswith(".py") or text in PICKLED or any(_python_files(folder))
    if key == "metric" and "metric_list" in keys:
        return text not in _metrics()
    return False


def _python_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from folder.glob("*.py")


def _metrics() -> Any:
    """The metrics of the harness; any other name is one that the library `evaluate` downloads and runs."""
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import METRIC_REGISTRY

    return METRIC_REGISTRY


def is_plain_template(text: str) -> bool:
    """Whether a Jinja template only puts fields of a question together, so that it cannot run code.

    Attributes and keys with an underscore in front lead to Python's own objects, so none is plain.
    """
    import jinja2
    from jinja2.defaults import DEFAULT_NAMESPACE

    try:
        template = jinja2.Environment().parse(text)
    except jinja2.TemplateError:
        return False
    reserved = {*DEFAULT_NAMESPACE, "self"}
    for node in template.find_all(_nodes().Node):
        kind = type(node).__name__
        if kind not in TEMPLATE_NODES:
            return False
        if kind == "Name" and (node.name in reserved or node.name.startswith("_")):
            return False
        if kind == "Getattr" and node.attr.startswith("_"):
            return False
        if kind == "Const" and isinstance(node.value, str) and "__" in node.value:
            return False
        if kind == "Getitem" and type(node.arg).__name__ not in ("Const", "Neg", "Slice"):
            return False
        if kind == "Filter" and node.name not in FILTERS:
            return False
        if kind == "Call" and not _is_plain_call(node):
            return False
    return True


def _is_plain_call(call: Any) -> bool:
    """Whether a call is of one of the methods that a template may call, on a field that the template itself names.

    An index that stands in the data could be the name of an attribute, and so lead to another object's method.
    """
    if type(call.node).__name__ != "Getattr" or call.node.attr not in METHODS:
        return False
    indices = [item.arg for item in call.node.find_all(_nodes().Getitem)]
    return all(type(index).__name__ in ("Const", "Neg", "Slice") for index in indices)


def _nodes() -> Any:
    import jinja2

    return jinja2.nodes
