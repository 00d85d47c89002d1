"""The text of tokens as they come: whole characters only, and nothing that a stop string may still remove."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes become that are not UTF-8, or not yet: a character may span several tokens."""


class TextStream:
    """Turns tokens into text, piece by piece.

    The pieces joined are the text of all tokens, up to the stop string that is complete first.

    Args:
        decode: the text of some token ids.
        stops: strings that end the text before them.

    Attributes:
        text: all text that is certain so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self._ids: list[
            int
        ] = []  # tokens before the next ones, which decide how these are written, and these
        self._shown = 0  # how many of them are in the text or held

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that has become certain, which may be empty."""
        assert not self.stopped
        self._ids.append(token)
        before = self._decode(self._ids[: self._shown])
        now = self._decode(self._ids)
        if now.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """Returns the rest of the text, after the last token."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[: self._shown])
        piece = self._release(self._decode(self._ids)[len(before) :])
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _release(self, new: str) -> str:
        """Adds characters one after the other; returns those that no stop string can remove any more."""
        begin = len(self.text)
        for character in new:
            self._held += character
            found = [stop for stop in self._stops if self._held.endswith(stop)]
            if found:
                longest = max(map(len, found))
                self.text += self._held[: len(self._held) - longest]
                self._held = ""
                self.stopped = True
                break
            kept = self._open_stop()
            self.text += self._held[: len(self._held) - kept]
            self._held = self._held[len(self._held) - kept :]
        return self.text[begin:]

    def _open_stop(self) -> int:
        """The length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
