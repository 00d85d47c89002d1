"""What is done with a recipe or a run: training it, loading its model, evaluating it, writing its summary."""
