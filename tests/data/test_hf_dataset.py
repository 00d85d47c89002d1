"""The corpus `hf_dataset` on folders that `save_to_disk` wrote; the hub is not asked."""

from pathlib import Path
from typing import Any

import pytest

from core.contracts.errors import ConfigError, UserError
from core.data.prepare import prepare
from plugins.hf_dataset import corpus as module
from plugins.hf_dataset.corpus import HfDataset

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"row {index} " * 20, "data": {"body": f"body {index}"}} for index in range(25)]


def corpus(path: Path | str, **settings: Any) -> HfDataset:
    config = HfDataset.Config(path=str(path), **settings)
    config.check(None)
    return HfDataset(config)


def texts(path: Path, **settings: Any) -> list[str]:
    return [document.data.decode() for document in corpus(path, **settings).documents()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one split, and one with two."""
    folder = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(folder / "two")
    return folder


def test_rows_are_documents_in_their_order(saved: Path) -> None:
    expected = [row["text"] for row in ROWS]
    assert texts(saved / "one") == expected
    assert texts(saved / "two") == expected
    assert texts(saved / "two", split="test") == expected[:3]
    assert texts(saved / "one", rows=2) == expected[:2]
    names = [document.name for document in corpus(saved / "one").documents()]
    assert names == sorted(names)
    assert prepare(corpus(saved / "one"), 260).validation.documents == 1


def test_keys_lead_into_structures(saved: Path) -> None:
    assert texts(saved / "one", text_key="data.body")[:2] == ["body 0", "body 1"]


def test_what_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two has no split 'dev' .* known: train, test"):
        texts(saved / "two", split="dev")
    with pytest.raises(UserError, match=r"row 0 has no text under the key 'body' .* text, data"):
        texts(saved / "one", text_key="body")
    with pytest.raises(UserError, match="is no folder of `save_to_disk`"):
        corpus(tmp_path).check_source()
    with pytest.raises(UserError, match="is no folder, and no name on the hub"):
        corpus(tmp_path / "not there").check_source()


def test_a_damaged_folder_is_one_sentence(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(data\.corpus\.path\) cannot be read: \w+: "):
        texts(tmp_path)


def test_without_the_library_the_extra_is_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        corpus(saved / "one").check_source()
    assert str(error.value) == (
        "corpus hf_dataset needs the package datasets, which is not installed: "
        "pip install 'moeloom[data]'"
    )


def test_a_name_on_the_hub_is_handed_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return datasets.Dataset.from_list(ROWS[:2]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = corpus("owner/stories", config="en", revision="abc", streaming=True, split="test")
    assert len(list(hub.documents())) == 2
    expected = {"split": "test", "revision": "abc", "streaming": True}
    assert asked == [(("owner/stories", "en"), expected)]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"path": " "}, "path"),
        ({"split": ""}, "split"),
        ({"text_key": ""}, "text_key"),
        ({"rows": 0}, "rows"),
    ],
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        HfDataset.Config(**{"path": "a", **settings}).check(None)
    assert error.value.key == key
