"""python -m core.generate RUN --prompt TEXT: continue texts with a trained model."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.command import (
    drop_free_argument,
    placement_argument,
    print_json,
    run_command,
    trust_argument,
    weights_argument,
)

if TYPE_CHECKING:
    from core.generation.completion import Completion, Completions
    from core.generation.options import GenerationOptions
    from core.generation.pass_times import PassTimes
    from core.generation.prompts import GivenPrompt
    from core.generation.run_tokenizer import RunTokenizer
    from core.model.language_model import LanguageModel
    from core.recipe.compose import Recipe
    from core.training.run_folder import RunFolder


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.generate", description="Write text with a trained model."
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    weights_argument(p)
    placement_argument(p)
    drop_free_argument(p)
    p.add_argument("--prompt", metavar="TEXT", help="what to continue")
    p.add_argument(
        "--prompt-ids",
        metavar="IDS",
        help="the same as token ids with commas between them, which need no tokenizer and get no marker",
    )
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="several texts to continue: one a line in a .txt file; JSON strings or lists of token ids, or objects "
        "with the key prompt, in a .jsonl file",
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="answer: each text is a user's turn in the words of the chat template of the run's tokenizer",
    )
    p.add_argument("--system", metavar="TEXT", help="the system message before it, with --chat")
    p.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="how many tokens to write at most (128, or as many as the model reads)",
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): the most likely token",
    )
    p.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely tokens only"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens only, whose probabilities add up to P",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text before this string; may be given several times",
    )
    p.add_argument("--batch", type=int, metavar="N", help="texts to write side by side (8)")
    p.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    p.add_argument(
        "--speculative",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="let the multi-token module draft N tokens (1) for each pass of the model",
    )
    p.add_argument("--stream", action="store_true", help="print the text as it comes")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Continues the prompts, and prints the texts and the speed; mistakes are found before the model is loaded."""
    from core.contracts.errors import NotFiniteError

    options = _options(arguments)
    prompts = _prompts(arguments)
    from core.deployment.placing import Placing
    from core.generation.completion import Completer
    from core.generation.pass_times import measure_passes
    from core.generation.printing import TextPrinter
    from core.generation.writer import Prompt
    from core.interop.run_weights import check_average
    from core.recipe.compose import compose_run
    from core.run.device import check_device
    from core.run.loading import load, run_of
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    run = run_of(checkpoint)
    if arguments.weights is not None:
        check_average(checkpoint, arguments.weights)
    placing = Placing(arguments.placement, drop_free=arguments.drop_free)
    recipe = compose_run(run.recipe, trust=arguments.trust)
    placing.check(recipe)
    notices = recipe.notices()
    for notice in notices:
        _say(f"note: {notice}")
    if options.drafts:
        check_heads(recipe)
    device = arguments.device or "cpu"
    check_device(device, recipe)
    tokenizer, end = _tokenizer(run, prompts, arguments)
    chat = None
    if arguments.chat:
        assert tokenizer is not None
        chat = tokenizer.chat()
        end = chat.turn_end()
    rows = []
    for number, prompt in enumerate(prompts):
        marked = ""
        if chat is not None and isinstance(prompt.content, str):
            ids = chat.prompt(_messages(prompt.content, arguments.system))
            marked = " in the words of the chat template"
        else:
            ids = _ids(prompt, tokenizer, recipe.data.tokenizer.vocab)
            marked = " with the marker" if isinstance(prompt.content, str) else ""
        where = f"{prompt.where} of {len(ids)} tokens{marked}"
        limit = options.limit(len(ids), recipe.model.rope.max_length, where, _flag)
        rows.append(Prompt(ids, limit, number))
    model = load(checkpoint, trust=arguments.trust, weights=arguments.weights).to(device)
    placing.place(model)
    _warn_of_batches(model, min(options.batch, len(rows)))
    printer = TextPrinter(
        prompts,
        tokenizer,
        streams=arguments.stream,
        is_file=arguments.prompts is not None,
        is_chat=arguments.chat,
    )
    on_text = None if tokenizer is None else printer.on_text
    completer = Completer(model, options, tokenizer, end, on_text)
    try:
        completions = completer.complete(rows)
        times = None
        drafted = len(completions.drafted)  # the most that a pass could draft
        if drafted:
            texts = [[*one.prompt, *one.tokens] for one in completions.items[: options.batch]]
            times = measure_passes(model, texts, replace(options, drafts=drafted))
    except NotFiniteError as cause:
        raise NotFiniteError(f"{checkpoint}: {cause}") from cause
    if arguments.json:
        print_json(_document(arguments, prompts, completions, times, notices))
        return
    printer.finish(completions)
    for line in _speed_lines(completions, times, options.drafts):
        _say(line)


def _options(arguments: argparse.Namespace) -> "GenerationOptions":
    """Returns the checked options of generation."""
    from core.contracts.errors import UserError
    from core.generation.options import GenerationOptions
    from core.storage.documents import is_text

    if arguments.stream and arguments.json:
        raise UserError("--stream cannot be combined with --json, which prints one whole document")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system needs --chat")
    if arguments.chat and arguments.prompt_ids is not None:
        raise UserError("--chat takes texts: it cannot be combined with --prompt-ids")
    if arguments.system is not None and not is_text(arguments.system):
        raise UserError("--system is not UTF-8 text")
    if arguments.speculative is not None and arguments.speculative < 1:
        raise UserError(f"--speculative = {arguments.speculative}: must be at least 1")
    if not all(map(is_text, arguments.stop)):
        raise UserError("--stop is not UTF-8 text")
    batch = arguments.batch
    if arguments.stream and arguments.prompts is not None:
        if batch not in (None, 1):
            raise UserError(
                f"--batch {batch} cannot be combined with --stream: texts are printed one after another"
            )
        batch = 1
    options = GenerationOptions(
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        batch=GenerationOptions.batch if batch is None else batch,
        drafts=arguments.speculative or 0,
    )
    options.check(_flag)
    return options


def _prompts(arguments: argparse.Namespace) -> "list[GivenPrompt]":
    """Returns the prompts of the command line."""
    from core.contracts.errors import UserError
    from core.generation.prompts import one_prompt, prompt_of_ids, read_prompts

    given = (arguments.prompt, arguments.prompt_ids, arguments.prompts)
    if sum(value is not None for value in given) != 1:
        raise UserError("give one of --prompt TEXT, --prompt-ids IDS and --prompts FILE")
    if arguments.prompts is not None:
        return read_prompts(Path(arguments.prompts))
    if arguments.prompt_ids is not None:
        return [prompt_of_ids(arguments.prompt_ids)]
    return [one_prompt(arguments.prompt)]


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    """The turns of a conversation that a text begins."""
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _tokenizer(
    run: "RunFolder", prompts: "list[GivenPrompt]", arguments: argparse.Namespace
) -> "tuple[RunTokenizer | None, int | None]":
    """Returns the tokenizer of a run, if there is one, and the token that ends a text.

    Raises:
        UserError: it cannot be read, and a prompt, --stop or --stream needs it.
    """
    from core.contracts.errors import UserError
    from core.generation.markers import markers_of
    from core.generation.run_tokenizer import RunTokenizer

    try:
        tokenizer = RunTokenizer.of(run)
    except UserError as cause:
        if any(isinstance(prompt.content, str) for prompt in prompts):
            raise UserError(f"{cause}; --prompt-ids needs no tokenizer") from cause
        for option in ("stop", "stream", "chat"):
            if getattr(arguments, option):
                raise UserError(f"{cause}; --{option} needs it") from cause
        _say(f"note: {cause}; tokens are printed by their ids")
    else:
        return tokenizer, tokenizer.end
    try:
        return None, markers_of(run).end
    except UserError:  # nothing is known that ends a text
        return None, None


def _ids(prompt: "GivenPrompt", tokenizer: "RunTokenizer | None", vocabulary: int) -> list[int]:
    """Returns the token ids of a prompt; a text begins with the marker.

    Raises:
        UserError: the model does not know an id.
    """
    from core.contracts.errors import UserError

    if isinstance(prompt.content, str):
        assert tokenizer is not None
        return tokenizer.prompt(prompt.content)
    for token in prompt.content:
        if not 0 <= token < vocabulary:
            raise UserError(
                f"{prompt.where} has token {token}, and the model knows {vocabulary}, from 0"
            )
    return list(prompt.content)


def _flag(setting: str) -> str:
    """The option of the command line for a setting."""
    if setting == "drafts":
        return "--speculative"
    return f"--{setting.replace('_', '-')}"


def check_heads(recipe: "Recipe") -> None:
    """Raises `UserError` if no loss head of a recipe drafts, or one does from states that decoding does not keep."""
    from core.assemble import build
    from core.contracts.errors import UserError
    from core.generation.drafting import drafting_head

    try:
        drafting_head(build(recipe, device="meta"))
    except UserError as error:
        raise UserError(f"--speculative: {error}") from error


def _warn_of_batches(model: "LanguageModel", rows: int) -> None:
    """Warns of routers that choose over all texts that are written side by side."""
    if rows < 2:
        return
    for path, layer in model.expert_layers().items():
        properties = layer.routing_properties
        if properties is not None and properties.batch_dependent:
            _say(
                f"note: the router of {path} chooses over a whole batch, so a text depends on the others that are "
                "written beside it; --batch 1 writes each by itself"
            )
            return


def _speed_lines(completions: "Completions", times: "PassTimes | None", drafts: int) -> "list[str]":
    """The lines about speed and drafts."""
    from core.generation.summary import draft_lines, speed_line

    return [speed_line(completions), *draft_lines(completions, times, drafts)]


def _document(
    arguments: argparse.Namespace,
    prompts: "list[GivenPrompt]",
    completions: "Completions",
    times: "PassTimes | None",
    notices: list[str],
) -> dict[str, Any]:
    """The JSON document: one text's fields at its top, those of several in a list."""
    from core.generation.summary import drafts_document, speed_document

    texts = [_text_document(*pair) for pair in zip(prompts, completions, strict=True)]
    document: dict[str, Any] = {"completions": texts}
    if arguments.prompts is None:
        (document,) = texts
    document.update(speed_document(completions))
    if arguments.speculative:
        document["speculative"] = drafts_document(completions, times, arguments.speculative)
    document["notices"] = notices
    return document


def _text_document(prompt: "GivenPrompt", found: "Completion") -> dict[str, Any]:
    return {
        "prompt": prompt.content,
        "text": found.text,
        "token_ids": found.tokens,
        "tokens": len(found.tokens),
        "prompt_tokens": len(found.prompt),
        "ended": found.ended,
    }


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
