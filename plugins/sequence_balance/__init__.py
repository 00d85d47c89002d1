"""The complementary sequence-wise balance loss."""

from typing import Any

from core.extension.hookspec import hookimpl


@hookimpl
def register(registry: Any) -> None:
    """Offer the components of this room."""
    registry.balancer("sequence", "plugins.sequence_balance.balancer:SequenceLoss")
