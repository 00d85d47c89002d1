"""What the strategy `pipeline` needs torch for: the division of a model into stages, and how they run."""
