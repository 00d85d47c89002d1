"""Speed and drafts of a call, as sentences and as data."""

from typing import Any

from core.generation.completion import Completions
from core.generation.pass_times import PassTimes


def speed_document(completions: Completions) -> dict[str, Any]:
    """The speeds in tokens per second: of all that was written, of reading the prompts, and of what followed them."""
    speed = completions.speed
    written = sum(len(one.tokens) for one in completions)
    seconds = speed.prefill_seconds + speed.decode_seconds
    return {
        "tokens_per_second": written / seconds,
        "prefill_tokens_per_second": speed.prompt_tokens / speed.prefill_seconds,
        "decode_tokens_per_second": _ratio(speed.tokens, speed.decode_seconds),
    }


def speed_line(completions: Completions) -> str:
    """One line about the speed."""
    document = speed_document(completions)
    written = sum(len(one.tokens) for one in completions)
    line = f"{written} tokens, {document['tokens_per_second']:.0f} tokens/s"
    parts = [f"prompt {document['prefill_tokens_per_second']:.0f}"]
    if document["decode_tokens_per_second"] is not None:
        parts.append(f"then {document['decode_tokens_per_second']:.0f}")
    return f"{line} ({', '.join(parts)})"


def drafts_document(
    completions: Completions, times: PassTimes | None, drafts: int
) -> dict[str, Any]:
    """How many drafts were accepted, what a pass with drafts costs, and what that means for the speed.

    Args:
        completions: what was written with drafts.
        times: the seconds of passes with and without drafts; None: not measured.
        drafts: drafts in a pass.
    """
    acceptance = [
        accepted / drafted
        for accepted, drafted in zip(completions.accepted, completions.drafted, strict=True)
    ]
    document: dict[str, Any] = {
        "drafts": drafts,
        "drafted": completions.drafted,
        "accepted": completions.accepted,
        "acceptance": acceptance,
        "tokens_per_pass": completions.tokens_per_pass,
        "break_even": None,
        "speed_up": None,
        "pass_seconds": None,
    }
    if times is not None:
        document["break_even"] = times.break_even
        document["pass_seconds"] = {
            "plain": times.plain,
            "verify": times.verify,
            "draft": times.draft,
            "rounds": times.rounds,
        }
        if completions.tokens_per_pass is not None:
            document["speed_up"] = times.speed_up(completions.tokens_per_pass)
    return document


def draft_lines(completions: Completions, times: PassTimes | None, drafts: int) -> list[str]:
    """The lines about drafts; none without drafts."""
    if not drafts:
        return []
    document = drafts_document(completions, times, drafts)
    if document["tokens_per_pass"] is None:
        return ["no draft was verified: the texts are too short"]
    shares = ", ".join(f"{share:.0%}" for share in document["acceptance"])
    lines = [
        f"drafts accepted by place in a pass: {shares}; {document['tokens_per_pass']:.2f} tokens a pass"
    ]
    if times is not None:
        verify = times.verify / times.plain
        draft = times.draft / times.plain
        lines.append(
            f"a pass costs {verify + draft:.2f} plain ones (verifying {verify:.2f}, drafting {draft:.2f}): drafts pay "
            f"from {times.break_even:.2f} accepted a pass; here {document['tokens_per_pass'] - 1:.2f}, "
            f"{document['speed_up']:.2f} times the speed of plain decoding"
        )
    return lines


def _ratio(count: int, seconds: float) -> float | None:
    """A rate; None where there was nothing."""
    if not count:
        return None
    return count / seconds
