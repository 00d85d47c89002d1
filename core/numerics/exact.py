"""State whose format must never change: a selection bias in bf16 stops moving once it passes 0.5."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ExactState(nn.Module):
    """A module whose own buffers keep their format under `.to(dtype)`, `.half()` and Lightning's precision plugins.

    Its buffers do move between devices, and off the meta device.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:
                if before.is_meta:
                    moved = torch.empty_like(before, device=after.device)
                else:
                    moved = before.to(after.device)
                self._buffers[name] = moved
        return self
