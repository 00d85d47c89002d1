"""How a model reads long texts: its loss by the length of the context, and whether it finds a needle in it."""
