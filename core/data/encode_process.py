"""python -m core.data.encode_process DTYPE: encodes the texts on its input until it ends; see `core.data.encoding`."""

import sys

import numpy as np

from core.data.encoder import Encoder
from core.data.encoding import read_frames, write_frames
from core.data.tokenizer import Tokenizer


def main() -> None:
    """Reads the tokenizer, then batch after batch."""
    (content,) = read_frames(sys.stdin.buffer)
    tokenizer = Tokenizer.parse(content.decode())
    encoder = Encoder(tokenizer, np.dtype(sys.argv[1]))
    while True:
        try:
            texts = read_frames(sys.stdin.buffer)
        except EOFError:
            return
        encoded = encoder.encode([text.decode() for text in texts])
        try:
            write_frames(sys.stdout.buffer, encoded)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
