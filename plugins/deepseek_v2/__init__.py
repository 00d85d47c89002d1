"""DeepSeek-V2: device-limited softmax routing and its three balance losses."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("deepseek_v2", "plugins.deepseek_v2.router:DeepSeekV2Router")
    registry.balancer("expert", "plugins.deepseek_v2.balancers:ExpertLoss")
    registry.balancer("device", "plugins.deepseek_v2.balancers:DeviceLoss")
    registry.balancer("communication", "plugins.deepseek_v2.balancers:CommunicationLoss")
