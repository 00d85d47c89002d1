"""Balance losses from frequencies and shares, over a sequence, a micro-batch or the whole batch."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.balancer("sequence", "plugins.share_balance.balancer:SequenceLoss")
    registry.balancer("batch", "plugins.share_balance.balancer:BatchLoss")
    registry.balancer("micro_batch", "plugins.share_balance.balancer:MicroBatchLoss")
