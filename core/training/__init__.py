"""How a model is trained: the step, the load it measures, when it saves, and how it stops."""
