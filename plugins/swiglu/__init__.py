"""The dense SwiGLU feed-forward layer."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.ffn("swiglu", "plugins.swiglu.ffn:SwiGLU")
