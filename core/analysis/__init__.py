"""What a model costs and what a recipe would build, counted on the meta device."""
