"""Writes results as lm-evaluation-harness's `--output_path` does, so that its readers find every field."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lm_eval.utils import handle_non_serializable

from core.contracts.errors import UserError
from core.storage.files import write_text


def check_folder(folder: Path) -> None:
    """Makes the folder for results, before any question is asked.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UserError(f"--output {folder}: cannot be made: {cause.strerror or cause}") from cause


class ResultsFile:
    """Collects what the harness writes beside its results; made before the questions are asked.

    Args:
        folder: the results are written to FOLDER/MODEL/results_DATE.json.
        model: name of the model: the path of its run.
        settings: what was requested, for the field `config`.
        template: the chat template that questions are asked with; None: none is.
    """

    def __init__(
        self, folder: Path, model: str, settings: Mapping[str, Any], template: str | None = None
    ) -> None:
        self._folder = folder
        self._settings = dict(settings)
        self._model = model
        self._began = datetime.now()
        self._tracker = GeneralConfigTracker()
        self._tracker.log_experiment_args(
            model_source="moeloom",
            model_args={"path": model},
            system_instruction=None,
            chat_template=template,
            fewshot_as_multiturn=template is not None,
        )

    def write(self, results: Mapping[str, Any]) -> Path:
        """Writes the results of the harness's `evaluate`, and returns the file."""
        self._tracker.log_end_time()
        config = {"model": "moeloom", "model_args": {"path": self._model}, **self._settings}
        content = {
            **results,
            "config": config,
            "git_hash": None,
            "date": self._began.timestamp(),
            "task_hashes": {},
            **asdict(self._tracker),
        }
        folder = self._folder / str(self._tracker.model_name_sanitized)
        folder.mkdir(parents=True, exist_ok=True)
        moment = datetime.now().isoformat().replace(":", "-")
        file = folder / f"results_{moment}.json"
        text = json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_text(file, text + "\n")
        return file
