"""Random damages of a folder: to files as a whole, to values in JSON and YAML, to tables, headers and checkpoints."""

import io
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import flip_bit

DEEP = 4000
"""Levels of nesting with which readers that recurse come to their end."""

LONG = "n" * 300
"""A name that no file can have."""

HALF = "\udc9f"
"""Half of a surrogate pair, which is not text."""


def damage(folder: Path, draw: random.Random) -> str:
    """Damages one file of a folder, and returns what was done."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    file = draw.choice(files)
    inner = _inner_of(file)
    if inner is not None and draw.random() < 0.6:
        what = inner(file, draw)
    else:
        kind = draw.choice(WHOLE)
        what = f"{kind.__name__[1:]}"
        kind(file, draw, files)
    return f"{file.relative_to(folder)}: {what}"


def _delete(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.unlink()


def _empty(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.write_bytes(b"")


def _truncate(file: Path, draw: random.Random, files: list[Path]) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])


def _flip(file: Path, draw: random.Random, files: list[Path]) -> None:
    content = file.read_bytes()
    for _ in range(draw.choice((1, 1, 8))):
        if content:
            content = flip_bit(content, draw.randrange(8 * len(content)))
    file.write_bytes(content)


def _zero(file: Path, draw: random.Random, files: list[Path]) -> None:
    content = bytearray(file.read_bytes())
    begin = draw.randrange(len(content) + 1)
    end = min(len(content), begin + draw.choice((1, 64, len(content))))
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)


def _append_garbage(file: Path, draw: random.Random, files: list[Path]) -> None:
    with file.open("ab") as stream:
        stream.write(draw.choice((b"\xff\xfe garbage\n", b"\n\n", b"x,y,z\n", bytes(100))))


def _repeat(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.write_bytes(file.read_bytes() * 2)


def _swap(file: Path, draw: random.Random, files: list[Path]) -> None:
    other = draw.choice(files)
    mine = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def _become_folder(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.unlink()
    file.mkdir()


def _become_fifo(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.unlink()
    os.mkfifo(file)


def _become_link(file: Path, draw: random.Random, files: list[Path]) -> None:
    target = draw.choice(["nowhere", file.name, "/dev/zero", str(draw.choice(files))])
    file.unlink()
    file.symlink_to(target)


def _rename(file: Path, draw: random.Random, files: list[Path]) -> None:
    file.rename(file.with_name(draw.choice([file.name.upper(), f"copy of {file.name}"])))


WHOLE: list[Callable[[Path, random.Random, list[Path]], None]] = [
    _delete,
    _empty,
    _truncate,
    _flip,
    _zero,
    _append_garbage,
    _repeat,
    _swap,
    _become_folder,
    _become_fifo,
    _become_link,
    _rename,
]


def _inner_of(file: Path) -> Callable[[Path, random.Random], str] | None:
    """The damage to the values in a file; None for a file without any that can be read."""
    if file.suffix == ".json":
        return _damage_json
    if file.suffix == ".yaml" and file.name != "hparams.yaml":
        return _damage_yaml
    return {".csv": _damage_table, ".safetensors": _damage_header, ".ckpt": _damage_checkpoint}.get(
        file.suffix
    )


def _damage_json(file: Path, draw: random.Random) -> str:
    value = json.loads(file.read_text(encoding="utf-8"))
    value, what = _changed(value, draw)
    file.write_text(_as_json(value), encoding="utf-8")
    return what


def _damage_yaml(file: Path, draw: random.Random) -> str:
    if draw.random() < 0.1:
        file.write_text("a: " + "[" * DEEP + "]" * DEEP, encoding="utf-8")
        return "nested"
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    value, what = _changed(value, draw)
    if what.endswith("nested"):
        value = None
    file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return what


def _damage_header(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, what = _changed(json.loads(content[8 : 8 + length]), draw)
    text = _as_json(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return what


def _damage_checkpoint(file: Path, draw: random.Random) -> str:
    content, what = _changed(torch.load(file, weights_only=True), draw, tensors=True)
    stream = io.BytesIO()
    torch.save(content, stream)
    file.write_bytes(stream.getvalue())
    return what


def _damage_table(file: Path, draw: random.Random) -> str:
    lines = file.read_bytes().splitlines(keepends=True)
    place = draw.randrange(len(lines))
    what = draw.choice(("cut", "garbage", "NULs", "extra", "float", "bytes", "twice", "header"))
    if what == "cut":
        lines = lines[:place]
    elif what == "garbage":
        lines.insert(place, b"a garbage line\n")
    elif what == "NULs":
        lines[place] = bytes(40) + b"\n"
    elif what == "extra":
        lines[place] = lines[place].rstrip(b"\n") + b",1,2,3\n"
    elif what == "float":
        lines = [line.replace(b",1,", b",1.0,").replace(b",2,", b",2.0,") for line in lines]
    elif what == "bytes":
        lines[place] = b"\xff\xfe" + lines[place]
    elif what == "twice":
        lines.insert(place, lines[place])
    else:
        lines = lines[1:]
    file.write_bytes(b"".join(lines))
    return f"line {place}: {what}"


def _as_json(value: Any) -> str:
    """A value as JSON, in which a marker stands for a list that is nested thousands deep."""
    return json.dumps(value).replace('"@nested"', "[" * DEEP + "]" * DEEP)


def _changed(value: Any, draw: random.Random, *, tensors: bool = False) -> tuple[Any, str]:
    """The value with one place changed, and what was done there."""
    places = list(_places(value, ()))
    path = draw.choice(places) if places else ()
    if path and draw.random() < 0.5:
        path = path[: draw.randint(1, len(path))]
    old = value
    for key in path:
        old = old[key]
    if path and draw.random() < 0.25:
        return _with(value, path, None, remove=True), f"{list(path)} removed"
    new, name = _other(old, draw, tensors=tensors)
    return _with(value, path, new), f"{list(path)} = {name}"


def _other(old: Any, draw: random.Random, *, tensors: bool) -> tuple[Any, str]:
    """Another value in the place of one, and its description."""
    if tensors and isinstance(old, torch.Tensor) and draw.random() < 0.7:
        made = draw.choice((old.flatten()[:1], old.to(torch.int64), old[None], old * float("nan")))
        return made, f"a tensor {made.dtype} {list(made.shape)}"
    values = [None, True, [], {}, "", "text", -1, 0, 10**12, 10**30, 1.5, [old], {"x": old}, LONG]
    names = [repr(value)[:40] for value in values]
    if not tensors:
        values += [float("nan"), float("inf"), HALF, "@nested", "../../etc/passwd", "a\0b"]
        names += ["nan", "inf", "half a pair", "nested", "a path", "a NUL"]
    index = draw.randrange(len(values))
    return values[index], names[index]


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all values below a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _with(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool = False) -> Any:
    """A copy of a value with another one at a path, or without the one there."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = _with(value[path[0]], path[1:], new, remove=remove)
    elif remove:
        del copy[path[0]]
    else:
        copy[path[0]] = new
    return copy
