"""The code stays readable: figures within their limits, no retired word, and a measure that would notice."""

import sys
from pathlib import Path

from .documents import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import readable


def test_density_and_vocabulary_are_within_their_limits() -> None:
    found = readable.measure(ROOT)
    assert found.retired == []
    assert found.prepositions == []
    assert found.texts == []
    dense = {
        name: round(value, 1)
        for name, value in found.per_thousand().items()
        if value > readable.LIMITS[name]
    }
    assert dense == {}
    assert found.within_limits()


def test_the_measure_counts_what_it_names(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.mkdir()
    (core / "dense.py").write_text(
        'def f(a):\n    """Of a thing."""\n    b, c = a, 1\n    b, c = c\n'
        "    return [x if x else c for x in b]\n" + f"# {'long ' * 25}\n",
        encoding="utf-8",
    )
    found = readable.measure(tmp_path)
    assert found.counts == dict.fromkeys(readable.LIMITS, 1)
    assert found.prepositions == ["core/dense.py:1 f"]
    assert found.lines == 6
    assert not found.within_limits()


def test_other_explanations_are_counted_apart_from_docstrings_of_functions(tmp_path: Path) -> None:
    """Modules, values, entries of `Args:`, and texts of keys and options; "at most" begins a noun phrase."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "text.py").write_text(
        "\n".join(
            [
                '"""In a module."""',
                "A = 1",
                '"""Of a value."""',
                "B = 2",
                '"""At most 3, of all values."""',
                "class C:",
                '    """A class.',
                "",
                "    Args:",
                "        a: the seed.",
                "        b, *c: of the draws,",
                "            of: a continued line.",
                "",
                "    Class attributes:",
                "        d: from a recipe.",
                "",
                "    Returns:",
                "        of: no argument.",
                '    """',
                "",
                '    d: int = setting(doc="from logits to gates")',
                '    e: int = setting(doc="at least 1")',
                '    f = option(help="with a help", other="of anything else")',
                '    g: int = setting(doc="after the last step")',
                '    h: int = setting(doc="up to 16 characters")',
            ]
        ),
        encoding="utf-8",
    )
    found = readable.measure(tmp_path)
    assert found.prepositions == []
    assert sorted(found.texts) == [
        "plugins/text.py:1 In a module.",
        "plugins/text.py:21 from logits to gates",
        "plugins/text.py:23 with a help",
        "plugins/text.py:24 after the last step",
        "plugins/text.py:3 Of a value.",
        "plugins/text.py:6 from a recipe.",
        "plugins/text.py:6 of the draws,",
    ]
    assert not found.within_limits()


def test_retired_words_are_found_alone_and_inside_of_identifiers() -> None:
    word, name = readable.WORDS[0], readable.NAMES[0]
    assert readable.retired_in("docs/a.md", f"The {word.upper()}s\nin{word} {word}way") == [
        f"docs/a.md:1 {word.upper()}s"
    ]
    assert readable.retired_in("core/a.py", f"is_{word} = {name}()") == [
        f"core/a.py:1 {word}",
        f"core/a.py:1 {name}",
    ]
    assert readable.retired_in("docs/a.md", f"{name} and `{name}`") == [f"docs/a.md:1 {name}"]


def test_retired_names_that_are_words_too_count_where_they_are_defined() -> None:
    name = readable.DEFINITIONS[0]
    assert readable.retired_in("core/a.py", f"class {name}:\n# {name}\nclass {name}s:") == [
        f"core/a.py:1 class {name}"
    ]
    assert readable.retired_in("core/a.py", "    refuses = {}\nIt refuses: a key") == [
        "core/a.py:1     refuses ="
    ]


def test_changelog_records_and_packaging_are_searched_too(tmp_path: Path) -> None:
    word = readable.WORDS[0]
    (tmp_path / "records").mkdir()
    for name in ("CHANGELOG.md", "pyproject.toml", "records/README.md", "records/run.json"):
        (tmp_path / name).write_text(f"the {word}\n", encoding="utf-8")
    assert sorted(readable.measure(tmp_path).retired) == [
        f"CHANGELOG.md:1 {word}",
        f"pyproject.toml:1 {word}",
        f"records/README.md:1 {word}",
    ]


def test_a_module_under_its_former_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / f"{readable.FILES[0]}.py").write_text("")
    assert len(readable.measure(tmp_path).retired) == 1


def test_every_exception_is_needed() -> None:
    for name in readable.ALLOWED:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert readable.retired_in(f"elsewhere/{name}", text), name
