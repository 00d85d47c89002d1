"""A small tokenizer of the same kind as DeepSeek's, in a Hugging Face folder, and a tiktoken file."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

BEGIN = "<｜begin▁of▁sentence｜>"  # noqa: RUF001
END = "<｜end▁of▁sentence｜>"  # noqa: RUF001
PAD = "<｜▁pad▁｜>"  # noqa: RUF001
USER = "<｜User｜>"  # noqa: RUF001
ASSISTANT = "<｜Assistant｜>"  # noqa: RUF001
THINK = "<think>"

TEXT = " ".join(f"word{n} the tale of {n * 37} houses, and it's read; again." for n in range(200))

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{USER}{{{{ message['content'] }}}}"
    f"{{% else %}}{ASSISTANT}{{% generation %}}{{{{ message['content'] }}}}{{{{ eos_token }}}}"
    "{% endgeneration %}{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
"""A chat template that marks the assistant's turns."""

PLAIN_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same without the marks."""

TIKTOKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def write_deepseek_like(
    folder: Path,
    *,
    vocab: int = 300,
    template: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `tokenizer.json` and `tokenizer_config.json`; returns the folder.

    The markers of documents are special, those of turns are added entries that are not, as in DeepSeek's file. Both
    kinds have ids with a gap between them and the model's own entries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([TEXT], trainer)
    engine.add_tokens(
        [AddedToken(one, normalized=True, special=False) for one in (USER, ASSISTANT, THINK)]
    )
    engine.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": BEGIN},
        "eos_token": {"__type": "AddedToken", "content": END},
        "pad_token": END,
        "model_max_length": 4096,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **(config or {})}))
    return folder


def write_tiktoken(file: Path, pairs: int = 40) -> dict[bytes, int]:
    """Writes a tiktoken file whose entries are the bytes and joined neighbours of `TEXT`; returns its entries."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    text = TEXT.encode()
    for size in (2, 3, 4):
        for begin in range(pairs):
            piece = text[begin : begin + size]
            if piece not in ranks and (piece[:-1] in ranks or piece[1:] in ranks):
                ranks[piece] = len(ranks)
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()]
    file.write_text("".join(lines))
    return ranks
