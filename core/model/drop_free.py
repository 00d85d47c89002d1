"""Evaluation and generation in which every assignment of a token to an expert is carried out."""

from core.contracts.errors import UserError
from core.model.language_model import LanguageModel


def drop_nothing(model: LanguageModel) -> None:
    """Makes a model carry out every assignment in evaluation mode, whatever its strategy drops.

    A capacity is then none, and chance drops nothing. Which experts are chosen, and their gates, stay as they are.
    Training is not affected.

    Args:
        model: a model.

    Raises:
        UserError: a router in which experts choose tokens: which tokens no expert chooses is its decision, not a drop.
    """
    layers = model.expert_layers()
    for path, layer in layers.items():
        properties = layer.routing_properties
        if properties is not None and not properties.token_choice:
            raise UserError(
                f"--drop-free: in {path} experts choose tokens; those that none chooses go past the experts, and no "
                "assignment of theirs could be kept"
            )
    for layer in layers.values():
        layer.drop_nothing()
