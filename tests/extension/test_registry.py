"""The registry turns a name into a class, and its error messages say why it cannot."""

from collections.abc import Callable

import pytest

from core.contracts.errors import UserError, nearest
from core.contracts.schema import Provenance
from core.extension.registry import Registry

Module = Callable[..., str]
OWNER = Provenance("somebody", "1.0", "point", "somebody.plugin")


def offering(slot: str, *names: str, target: str = "somebody.parts:Part") -> Registry:
    registry = Registry()
    for name in names:
        registry.owned_by(OWNER).add(slot, name, target)
    return registry


def test_an_unknown_name_is_reported_with_the_nearest_and_all_of_its_slot() -> None:
    registry = offering("router", "switch", "gshard", "gshard_dropless", "hash")
    registry.owned_by(OWNER).corpus("switsh", "somebody.parts:Part")
    with pytest.raises(UserError) as caught:
        registry.find("router", "switsh")
    assert str(caught.value) == (
        "no router is named 'switsh'; did you mean switch? known: gshard, gshard_dropless, hash, switch"
    )


@pytest.mark.parametrize("name", ["fp16", "float16", "16-mixed"])
def test_a_name_that_people_miss_is_reported_with_the_reason(name: str) -> None:
    registry = offering("precision", "bf16", "fp32")
    with pytest.raises(UserError) as caught:
        registry.find("precision", name)
    assert str(caught.value) == (
        f"no precision is named {name!r}: its smallest number is 6e-8 and its largest 65504, so gradients need loss "
        "scaling, which does not exist here; use bf16, which has the range of fp32, or fp32"
    )


def test_a_plugin_may_offer_what_is_missed() -> None:
    registry = offering("precision", "fp16")
    assert registry.find("precision", "fp16").target == "somebody.parts:Part"


def test_an_unknown_slot_is_reported_with_the_nearest() -> None:
    with pytest.raises(
        UserError,
        match=r"there is no slot 'ruoter'; did you mean router\? known: attention, balancer",
    ):
        offering("router", "switch").find("ruoter", "switch")


def test_the_nearest_names_are_at_most_two_closest_first() -> None:
    message = nearest("gshad", ["switch", "gshard", "gshard2", "gshard3"])
    assert message == "did you mean gshard or gshard3? known: gshard, gshard2, gshard3, switch"
    assert nearest("zzz", ["switch", "hash"]) == "known: hash, switch"
    assert nearest("zzz", []) == "nothing is allowed here"


PARTS = '''
    from dataclasses import dataclass

    from core.contracts.corpus import Corpus


    class Bare:
        """No corpus."""

        @dataclass(kw_only=True)
        class Config:
            pass


    class Unset(Corpus):
        def documents(self):
            return iter(())


    class Plain(Corpus):
        class Config:
            pass

        def documents(self):
            return iter(())


    def function():
        pass
'''


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (
            "parts:Missing",
            "corpus 'mine' of somebody (parts:Missing): module parts has no class Missing",
        ),
        (
            "parts:Bare",
            "corpus 'mine' of somebody (parts:Bare) is not a subclass of core.contracts.corpus.Corpus",
        ),
        (
            "parts:function",
            "corpus 'mine' of somebody (parts:function) is not a subclass of core.contracts.corpus.Corpus",
        ),
        (
            "parts:Unset",
            "corpus 'mine' of somebody (parts:Unset): Unset has no Config: nest the schema, "
            "`@dataclass(kw_only=True) class Config`",
        ),
        (
            "parts:Plain",
            "corpus 'mine' of somebody (parts:Plain): Plain.Config is not a dataclass: "
            "write @dataclass(kw_only=True) above it",
        ),
        (
            "nowhere.parts:Part",
            "corpus 'mine' of somebody (nowhere.parts:Part) cannot be imported: "
            "ModuleNotFoundError: No module named 'nowhere'",
        ),
        (
            "failing:Part",
            "corpus 'mine' of somebody (failing:Part) cannot be imported: OSError: libfast.so: cannot open",
        ),
    ],
    ids=[
        "missing",
        "other class",
        "function",
        "no Config",
        "Config no dataclass",
        "no module",
        "fails",
    ],
)
def test_P19_a_target_that_is_no_component_is_reported_when_it_is_used(
    target: str, why: str, module: Module
) -> None:
    module("parts", PARTS)
    module("failing", "raise OSError('libfast.so: cannot open')")
    entry = offering("corpus", "mine", target=target).find("corpus", "mine")  # known, not imported
    with pytest.raises(UserError) as caught:
        entry.load()
    assert str(caught.value) == why
