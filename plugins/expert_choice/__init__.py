"""Expert choice: experts choose tokens."""

from core.extension.hookspec import Registrar, hookimpl

CONTRACTS = "2.0"


@hookimpl
def register(registry: Registrar) -> None:
    """Offers the components of this package."""
    registry.router("expert_choice", "plugins.expert_choice.router:ExpertChoiceRouter")
