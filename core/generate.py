"""python -m core.generate RUN --prompt TEXT: continue a text with a trained model."""

import argparse
import sys
import time

from core.command import print_json, run_command, trust_argument


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.generate", description="Write text with a trained model."
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    p.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
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
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens only",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Loads the model, continues the prompt, and prints the text and the speed."""
    from pathlib import Path

    from core.contracts.errors import NotFiniteError, UserError

    if arguments.tokens is not None and arguments.tokens < 1:
        raise UserError(f"--tokens = {arguments.tokens}: must be at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature = {arguments.temperature}: must be a number of at least 0")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p = {arguments.top_p}: must be more than 0 and at most 1")
    from core.harness.markers import markers_of
    from core.model.sampling import sample
    from core.recipe.compose import compose_run
    from core.run.loading import load, run_of
    from core.training.resume import newest_checkpoint

    checkpoint = newest_checkpoint(Path(arguments.run))
    model = load(checkpoint, trust=arguments.trust)
    run = run_of(checkpoint)
    notices = compose_run(run.recipe, trust=arguments.trust).notices()
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    tokenizer = run.load_tokenizer()
    markers = markers_of(run)
    prompt = [markers.begin, *tokenizer.encode(arguments.prompt)]
    longest = model.max_length + 1  # the last token that is written is not read
    most = longest - len(prompt)
    if most < (arguments.tokens or 1):
        raise UserError(
            f"--prompt of {len(prompt)} tokens with the marker, --tokens {arguments.tokens or 1}: together at most "
            f"{longest}, because the model reads model.rope.max_length = {model.max_length}"
        )
    begin = time.perf_counter()
    tokens = sample(
        model,
        prompt,
        tokens=arguments.tokens or min(128, most),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=markers.end,
    )
    try:
        written = list(tokens)
    except NotFiniteError as cause:
        raise NotFiniteError(f"{checkpoint}: {cause}") from cause
    seconds = time.perf_counter() - begin
    text = tokenizer.decode(written)
    rate = len(written) / seconds
    if arguments.json:
        document = {
            "prompt": arguments.prompt,
            "text": text,
            "tokens": len(written),
            "tokens_per_second": rate,
            "notices": notices,
        }
        print_json(document)
    else:
        print(arguments.prompt + text)
        print(f"{len(written)} tokens, {rate:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
