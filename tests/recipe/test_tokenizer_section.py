"""The section `data.tokenizer` of a recipe that names a file."""

import json
import os
import shutil
from pathlib import Path

import pytest
from lab import SMALL, write_texts
from tokenizer_files import BEGIN, END, USER, write_deepseek_like

from core.contracts.errors import UserError
from core.recipe.compose import compose
from core.run.data import tokenizer_of


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `small.yaml`, which trains a tokenizer of 300 entries, and the file of another, `hf`."""
    write_texts(tmp_path / "texts", count=2)
    (tmp_path / "small.yaml").write_text(SMALL.format(texts=tmp_path / "texts"))
    write_deepseek_like(tmp_path / "hf")
    return tmp_path


def extended(place: Path, section: str) -> Path:
    file = place / "own.yaml"
    file.write_text(f"extends: small.yaml\ndata: {{tokenizer: {section}}}\n")
    return file


def test_a_file_gives_its_size_and_markers_in_place_of_what_is_extended(place: Path) -> None:
    section = compose(extended(place, "{file: hf}")).data.tokenizer
    assert (section.vocab, section.begin, section.end) == (303, BEGIN, END)
    assert section.file == str(place / "hf")


def test_the_path_is_relative_to_the_file_that_names_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = extended(place, "{file: ./hf/tokenizer.json}")
    monkeypatch.chdir("/")
    relative = os.path.relpath(file)
    assert compose(relative).data.tokenizer.file == str(place / "hf" / "tokenizer.json")
    monkeypatch.chdir(place / "hf")
    found = compose(place / "small.yaml", ["data.tokenizer.file=tokenizer.json"])
    assert found.data.tokenizer.file == str(place / "hf" / "tokenizer.json")


def test_the_vocabulary_is_padded_on_request(place: Path) -> None:
    file = extended(place, "{file: hf, pad_to_multiple_of: 64}")
    assert compose(file).data.tokenizer.vocab == 320
    assert compose(file, ["data.tokenizer.vocab=384"]).data.tokenizer.vocab == 384
    with pytest.raises(UserError, match=r"pad_to_multiple_of = 64: must divide .* = 330"):
        compose(file, ["data.tokenizer.vocab=330"])


def test_a_resolved_recipe_is_read_without_the_file(place: Path) -> None:
    import yaml

    found = compose(extended(place, "{file: hf, pad_to_multiple_of: 64}")).to_dict()
    shutil.rmtree(place / "hf")
    (place / "resolved.yaml").write_text(yaml.safe_dump(found, allow_unicode=True))
    assert compose(place / "resolved.yaml").to_dict() == found


def test_a_later_layer_may_train_a_tokenizer_again(place: Path) -> None:
    file = extended(place, "{file: hf}")
    section = compose(file, ["data.tokenizer.file=null", "data.tokenizer.vocab=280"]).data.tokenizer
    assert (section.vocab, section.file, section.begin, section.end) == (280, None, None, None)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("{file: none}", "data.tokenizer.file = '{p}/none': there is no such file"),
        ("{file: texts}", "data.tokenizer.file = '{p}/texts': this folder holds no tokenizer.json"),
        ("{file: hf, vocab: 100}", "data.tokenizer.vocab = 100: must be at least 303"),
        ("{file: hf, vocab: 0}", "data.tokenizer.vocab = 0: must be at least 1"),
        ("{file: hf, end: '<eos>'}", "data.tokenizer.end = '<eos>': must be an entry of {p}/hf"),
        ("{file: hf, pattern: x}", "data.tokenizer.pattern = 'x': must be null"),
        ("{file: hf, pad_to_multiple_of: 0}", "pad_to_multiple_of = 0: must be at least 1"),
        ("{file: [hf]}", "data.tokenizer.file = ['hf']: must be "),
        ("{end: x}", "data.tokenizer.end = 'x': must be null without data.tokenizer.file"),
        ("{pad_to_multiple_of: 8}", "pad_to_multiple_of = 8: must be 1 without"),
    ],
)
def test_mistakes_name_file_key_and_value(place: Path, section: str, sentence: str) -> None:
    file = extended(place, section)
    with pytest.raises(UserError) as found:
        compose(file)
    assert str(found.value).startswith(f"{file}: ")
    assert sentence.format(p=place) in str(found.value)
    assert "\n" not in str(found.value)


def test_markers_may_be_named(place: Path) -> None:
    section = compose(extended(place, f"{{file: hf, end: '{USER}'}}")).data.tokenizer
    assert (section.begin, section.end) == (BEGIN, USER)


@pytest.mark.parametrize("key", ["begin", "end", "pattern"])
def test_a_number_where_a_text_belongs_is_named(place: Path, key: str) -> None:
    """The vocabulary is read from the file, so a mistake beside it must not end as one of the vocabulary."""
    with pytest.raises(UserError, match=rf"data\.tokenizer\.{key} = 5: must be "):
        compose(extended(place, f"{{file: hf, {key}: 5}}"))


def test_ids_that_are_no_numbers_end_in_a_sentence(place: Path) -> None:
    """As in a file of which a part was moved into another."""
    file = place / "hf" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {"x": content["model"]["vocab"]}
    file.write_text(json.dumps(content))
    (place / "hf" / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 1}')
    (place / "hf" / "tokenizer_config.json").unlink()
    recipe = compose(extended(place, "{file: hf}"))
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        tokenizer_of(recipe)
