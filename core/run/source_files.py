"""The files of another program that came with a model, kept by the runs that train it further.

So `convert to-hf` can give a model back with the tokenizer, chat template and configuration with which it came.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.data.tokenizer import Tokenizer
from core.generation.markers import markers_of
from core.interop.source_folder import small_files
from core.training.run_folder import RunFolder


def keep_source_files(
    source: RunFolder,
    folder: RunFolder,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Copies the small files of a converted run, or of one that was trained from it, into a new run.

    Args:
        source: the run whose weights the new one starts from.
        folder: the new run.
        tokenizer: that of the new run; None: it takes tokens. Another one than the source's leaves the files behind.
        say: called with a note in that case.

    Returns:
        What belongs into the new run's provenance: the tokens that begin and end a text.
    """
    if not source.source_layout.is_file():
        return {}
    if tokenizer is not None and not _has_same(source, tokenizer):
        say(
            f"note: this run has another tokenizer than {source.path}, so its tokenizer files and chat template are "
            "not kept"
        )
        return {}
    source.check_digests(source.source_files.name)
    folder.source_files.mkdir(exist_ok=True)
    for file in small_files(source.source_files, say):
        shutil.copyfile(file, folder.source_files / file.name)
    markers = markers_of(source)
    return {"markers": {"begin": markers.begin, "end": markers.end}}


def _has_same(source: RunFolder, tokenizer: Tokenizer) -> bool:
    """Whether the run at the source has the tokenizer."""
    if not source.tokenizer.is_file():
        return False
    return source.load_tokenizer().entries() == tokenizer.entries()


def run_at(checkpoint: Path) -> RunFolder:
    """The folder of the run that a checkpoint, or the index of converted weights, belongs to."""
    return RunFolder(checkpoint.parent.parent)
