"""One line about the text of a run: how much of it there is, and how often the run reads it."""

from core.data.module import TextData


def reading_line(data: TextData) -> str:
    """The line that a run prints before it starts."""
    read = f"{data.plan.tokens:,} tokens are trained on"
    text = f"{data.train_tokens:,} tokens in {count_of(data.train_documents, 'document')}"
    held = f"{count_of(data.validation_documents, 'document')} held out"
    return f"text: {text}, {held}; {read}: {times(data.epochs())}"


def source_lines(data: TextData) -> list[str]:
    """Lines about parts of a mixture or sides of a shift (share, how often it is read), FIM and packing."""
    epochs = data.source_epochs(data.plan.tokens)
    lines = []
    for name, weight in data.source_weights().items():
        lines.append(f"  {name}: {weight:.4g} of the sequences, {times(epochs[name])}")
    around = data.epochs_around_shift()
    if around is not None:
        lines.append(f"  until the shift after step {data.shift_step}: {times(around[0])}")
        lines.append(f"  after the shift: {times(around[1])}")
    return [*lines, *data.sequence_lines()]


def times(epochs: float) -> str:
    """How often something is read, in words."""
    return f"{epochs:.3g} epochs"


def count_of(count: int, noun: str) -> str:
    """A number with its noun, which gets an s unless the number is 1."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
