"""How plugins are found, what they offer, and who offered it; nothing here imports torch."""
