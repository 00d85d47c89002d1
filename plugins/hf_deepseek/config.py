"""Reading a configuration file: values with transformers' defaults, and checks that hold for every model."""

from collections.abc import Mapping
from typing import Any

from core.contracts.errors import ConfigError

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms: transformers and the released code use it whatever `rms_norm_eps` is."""

LARGEST = 100_000_000
"""Largest width, rank or vocabulary that is read; the largest of a released model is below a million."""

MOST_LAYERS = 10_000
MOST_EXPERTS = 100_000

MOST_ROWS = 10_000_000
"""Most rows of a projection of all heads, whose order is listed where rotated rows are in halves."""

COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "q_lora_rank": 1536,
}
"""Defaults of transformers that DeepSeek-V2 and V3 share."""

MUST_BE = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "attention_dropout": (0, 0.0, None),
    "swiglu_limit": (None,),
}
"""Keys that would change a forward, and their only allowed values, which do not."""

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""How a released checkpoint describes its FP8 weights."""


class HfConfig:
    """A Hugging Face configuration with defaults.

    Args:
        config: the file's content.
        defaults: the values that transformers uses for missing keys.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config = config
        self._defaults = {**COMMON, **defaults}

    def get(self, key: str) -> Any:
        """Returns a value, which may be null.

        Raises:
            ConfigError: the key is missing and has no default.
        """
        if key in self._config:
            return self._config[key]
        if key not in self._defaults:
            raise ConfigError(key, "this key is missing")
        return self._defaults[key]

    def count(self, key: str, low: int = 1, high: int = LARGEST) -> int:
        """Returns a whole number from `low` to `high`.

        Raises:
            ConfigError: the key is missing, or its value is not a whole number, too small or too large.
        """
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(key, f"must be a whole number of at least {low}")
        if value > high:
            raise ConfigError(key, f"must be at most {high}: no model of that size can be built")
        return value

    def number(self, key: str) -> float:
        """Returns a number.

        Raises:
            ConfigError: the key is missing, or its value is not a number.
        """
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(key, "must be a number")
        return float(value)

    def check(self, **more: tuple[Any, ...]) -> None:
        """Checks the settings that our layers do not have.

        Args:
            **more: the allowed values of further keys; the first of each is named in the message.

        Raises:
            ConfigError: a setting has another value.
        """
        for key, allowed in {**MUST_BE, **more}.items():
            if key in self._config and self._config[key] not in allowed:
                raise ConfigError(key, f"must be {_shown(allowed[0])}: nothing else is supported")
        heads = self._config.get("num_key_value_heads")
        if heads not in (None, self.get("num_attention_heads")):
            raise ConfigError(
                "num_key_value_heads",
                "must equal num_attention_heads, as always in latent attention",
            )
        self._check_fp8()

    def _check_fp8(self) -> None:
        quantisation = self._config.get("quantization_config")
        if quantisation is None:
            return
        for key in ("quant_method", "fmt", "weight_block_size"):
            if not isinstance(quantisation, dict) or quantisation.get(key, FP8[key]) != FP8[key]:
                raise ConfigError(
                    "quantization_config",
                    f"must have {key} = {FP8[key]}: only the FP8 blocks of the released checkpoints are supported",
                )


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
