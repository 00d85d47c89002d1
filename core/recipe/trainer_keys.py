"""The keys of `trainer`: those that the recipe sets elsewhere, and those that are free, with their values."""

from typing import Any

from core.contracts.errors import ConfigError

OWNED_TRAINER_KEYS = {
    "accelerator": "strategy",
    "accumulate_grad_batches": "batch.accumulate",
    "barebones": "loggers",
    "callbacks": "callbacks",
    "check_val_every_n_epoch": "validation.every_steps",
    "default_root_dir": "--out",
    "devices": "strategy",
    "enable_autolog_hparams": "loggers",
    "enable_checkpointing": "checkpoint",
    "fast_dev_run": "--dry-run",
    "gradient_clip_algorithm": "gradient_clip",
    "gradient_clip_val": "gradient_clip",
    "limit_predict_batches": "the command generate",
    "limit_test_batches": "the command evaluate",
    "limit_train_batches": "budget",
    "limit_val_batches": "validation",
    "logger": "loggers",
    "max_epochs": "budget",
    "max_steps": "budget",
    "max_time": "budget",
    "min_epochs": "budget",
    "min_steps": "budget",
    "model_registry": "checkpoint",
    "num_nodes": "strategy",
    "num_sanity_val_steps": "validation",
    "overfit_batches": "batch",
    "plugins": "precision",
    "precision": "precision",
    "reload_dataloaders_every_n_epochs": "data",
    "strategy": "strategy",
    "use_distributed_sampler": "batch",
    "val_check_interval": "validation.every_steps",
}
"""Keys of `lightning.Trainer` that the recipe sets elsewhere, each with that place."""

FREE_TRAINER_KEYS = frozenset(
    {
        "benchmark",
        "detect_anomaly",
        "deterministic",
        "enable_model_summary",
        "enable_progress_bar",
        "inference_mode",
        "log_every_n_steps",
        "profiler",
        "sync_batchnorm",
    }
)
"""Keys of `lightning.Trainer` that a recipe's `trainer` may hold."""


PROFILERS = ("simple", "advanced", "pytorch")
"""Profilers of `lightning.Trainer` that are chosen by name and run on any machine."""


def check_trainer_values(trainer: dict[str, Any]) -> None:
    """Raises `ConfigError` for a value of `trainer` at which Lightning would stop, or which it would not understand."""
    for key, value in trainer.items():
        if key == "log_every_n_steps":
            is_right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            allowed = "a whole number of at least 1"
        elif key == "profiler":
            is_right = value is None or value in PROFILERS
            allowed = f"null or one of {', '.join(PROFILERS)}"
        elif key == "deterministic":
            is_right = value is None or isinstance(value, bool) or value == "warn"
            allowed = "true, false or warn"
        elif key in ("inference_mode", "detect_anomaly", "sync_batchnorm"):
            is_right = isinstance(value, bool)
            allowed = "true or false"
        else:
            is_right = value is None or isinstance(value, bool)
            allowed = "true, false or null"
        if not is_right:
            raise ConfigError(f"trainer.{key}", f"must be {allowed}")
