"""Makes `tiny_components` importable, as a recipe's `plugins:` needs it."""

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
