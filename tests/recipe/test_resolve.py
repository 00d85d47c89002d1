"""One section against its dataclass: types, unions with a schedule, nested sections, and nothing shared between two."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from core.contracts.errors import ConfigError, UserError
from core.contracts.schedule import Schedule, Scheduled, Segment
from core.contracts.schema import setting
from core.extension.registry import Registry
from core.recipe.key_paths import to_dict
from core.recipe.resolve import Resolver


@dataclass(kw_only=True)
class Inner:
    size: int = setting(doc="how large")
    words: list[str] | None = setting(None, doc="some words")


@dataclass(kw_only=True)
class Outer:
    scheduled: Scheduled = setting(0.5, doc="a number or a schedule")
    maybe: float | Schedule | None = setting(None, doc="the same, or nothing")
    words: list[str] | None = setting(None, doc="a list or nothing")
    counts: list[int] = setting([1, 2], doc="whole numbers")
    mode: Literal["soft", "hard"] = setting("soft", doc="one of two")
    flag: bool | None = setting(None, doc="true, false or nothing")
    either: int | str = setting(1, doc="a whole number or a string")
    free: dict[str, Any] = setting({}, doc="anything")
    inner: Inner | None = setting(None, doc="a section or nothing")
    inners: list[Inner] = setting([], doc="a list of sections")
    by_name: dict[str, Inner] = setting({}, doc="sections by name")

    def check(self, parent: Any) -> None:
        if self.mode == "hard" and parent != "around":
            raise ConfigError("inners.0.size", "must be soft here")


def resolver() -> Resolver:
    return Resolver(Registry(), lambda path: "file.yaml", {})


def read(parent: Any = None, /, **raw: Any) -> Outer:
    section: Outer = resolver().section(Outer, raw, "outer", parent)
    return section


def message_of(**raw: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(**raw)
    return str(caught.value)


RAMP = {"start": 1, "unit": "steps", "segments": [{"until": 1e3, "shape": "linear", "to": 2}]}


def test_a_scheduled_field_takes_a_number_or_a_mapping() -> None:
    assert read(scheduled=3).scheduled == 3.0
    assert type(read(scheduled=3).scheduled) is float
    expected = Schedule(
        start=1.0, unit="steps", segments=[Segment(until=1000.0, shape="linear", to=2.0)]
    )
    assert read(scheduled=RAMP).scheduled == expected
    assert read(maybe=RAMP).maybe == expected
    assert read(maybe=0.25).maybe == 0.25
    assert read().maybe is None
    assert read(maybe=None).maybe is None


def test_a_mistake_inside_a_schedule_is_reported_with_its_path() -> None:
    assert message_of(scheduled={}) == (
        "file.yaml: outer.scheduled.start = null: must be given, unless wsd is"
    )
    assert message_of(scheduled={"start": 0, "segment": []}) == (
        "file.yaml: outer.scheduled.segment: unknown key; did you mean segments? known: segments, start, unit, wsd"
    )
    assert message_of(maybe={"start": 0, "segments": [{"until": 1, "shape": "lin"}]}) == (
        "file.yaml: outer.maybe.segments.0.shape = 'lin': must be one of constant, linear, cosine, 1-sqrt"
    )
    assert message_of(scheduled=[1]) == (
        "file.yaml: outer.scheduled = [1]: must be a number or a schedule (keys: start, unit, segments, wsd)"
    )
    assert message_of(maybe="x").endswith(
        "must be a number or a schedule (keys: start, unit, segments, wsd) or null"
    )


@pytest.mark.parametrize(
    ("given", "kept"), [(None, None), (["a", "b"], ["a", "b"]), ([], []), ([1], ["1"])]
)
def test_an_optional_list_takes_null_and_lists(given: Any, kept: Any) -> None:
    assert read(words=given).words == kept


def test_a_list_of_whole_numbers_takes_1e6_and_refuses_the_rest() -> None:
    assert read(counts=[1e6, 2]).counts == [1_000_000, 2]
    for wrong in ([1.5], [True], [None], ["a"], 3, {"a": 1}, None):
        assert "outer.counts" in message_of(counts=wrong)
        assert message_of(counts=wrong).endswith("must be a list, each item a whole number")


@pytest.mark.parametrize("given", [True, False, None])
def test_an_optional_bool_takes_its_three_values(given: bool | None) -> None:
    assert read(flag=given).flag is given


@pytest.mark.parametrize("given", [0, 1, 1.0, "perhaps", []])
def test_a_bool_is_no_number(given: Any) -> None:
    assert message_of(flag=given).endswith("must be true or false or null")


def test_a_union_keeps_the_type_that_it_was_given() -> None:
    assert read(either=3).either == 3
    assert read(either="three").either == "three"
    assert (
        message_of(either=True)
        == "file.yaml: outer.either = true: must be a whole number or a string"
    )


def test_a_literal_takes_its_words_only() -> None:
    assert message_of(mode="loud") == "file.yaml: outer.mode = 'loud': must be one of soft, hard"
    assert message_of(mode=True) == "file.yaml: outer.mode = true: must be one of soft, hard"


def test_a_free_mapping_keeps_whatever_it_holds() -> None:
    free = {"a": 1, "b": [1.5, None, {"c": True}], "d": "x"}
    found = read(free=free).free
    assert found == free
    assert type(found) is dict
    assert type(found["b"]) is list
    assert type(found["b"][2]) is dict


def test_sections_nest_in_every_form() -> None:
    found = read(
        inner={"size": 1},
        inners=[{"size": 2}, {"size": 3, "words": ["a"]}],
        by_name={"x": {"size": 4}},
    )
    assert found.inner == Inner(size=1)
    assert found.inners == [Inner(size=2), Inner(size=3, words=["a"])]
    assert found.by_name == {"x": Inner(size=4)}
    assert read(inner=None).inner is None
    assert read().inners == []


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"inner": 3}, "outer.inner = 3: must be a section of keys: size, words"),
        ({"inner": {}}, "outer.inner.size: required key is missing (how large)"),
        (
            {"inner": {"size": 1, "wrods": []}},
            "outer.inner.wrods: unknown key; did you mean words? known: size, words",
        ),
        ({"inners": {"size": 1}}, "outer.inners: must be a list of sections"),
        (
            {"inners": [{"size": 1}, 2]},
            "outer.inners.1 = 2: must be a section of keys: size, words",
        ),
        (
            {"inners": [{"size": 1}, {"size": "x"}]},
            "outer.inners.1.size = 'x': must be a whole number",
        ),
        ({"by_name": [1]}, "outer.by_name = [1]: must map names to sections"),
        ({"by_name": {"x": {}}}, "outer.by_name.x.size: required key is missing (how large)"),
        (
            {"by_name": {"": {"size": 1}}},
            "outer.by_name: a name must not be empty or hold a dot, as '' does",
        ),
    ],
)
def test_a_mistake_inside_a_nested_section_is_reported_with_its_path(
    raw: dict[str, Any], sentence: str
) -> None:
    assert message_of(**raw) == f"file.yaml: {sentence}"


def test_check_sees_the_section_around_and_its_key_is_shown_with_its_value() -> None:
    assert read("around", mode="hard").mode == "hard"
    with pytest.raises(UserError) as caught:
        read(mode="hard", inners=[{"size": 7}])
    assert str(caught.value) == "file.yaml: outer.inners.0.size = 7: must be soft here"


def test_two_sections_of_one_schema_share_nothing() -> None:
    first = read(counts=[5], free={"a": 1}, words=["x"], by_name={"x": {"size": 1}})
    second = read()
    assert (second.counts, second.free, second.words, second.by_name) == ([1, 2], {}, None, {})
    second.counts.append(3)
    second.free["b"] = 2
    assert (read().counts, read().free, first.counts) == ([1, 2], {}, [5])


def test_two_schemas_of_one_name_are_reported_apart() -> None:
    def schema(kind: type) -> type:
        @dataclass(kw_only=True)
        class Config:
            value: kind = setting(doc="a value of one kind")  # type: ignore[valid-type]

        return Config

    numbers, strings = schema(int), schema(str)
    assert resolver().section(numbers, {"value": 3}, "a").value == 3
    assert resolver().section(strings, {"value": 3}, "b").value == "3"
    with pytest.raises(UserError, match=r"a\.value = 'x': must be a whole number"):
        resolver().section(numbers, {"value": "x"}, "a")


def test_plain_containers_come_back_as_they_were_read() -> None:
    raw = {
        "scheduled": RAMP,
        "words": ["a"],
        "inner": {"size": 1},
        "inners": [{"size": 2}],
        "by_name": {"x": {"size": 4}},
    }
    plain = to_dict(read(**raw))
    assert read(**plain) == read(**raw)
    assert to_dict(read(**plain)) == plain
    assert plain["scheduled"] == {**RAMP, "wsd": None}
