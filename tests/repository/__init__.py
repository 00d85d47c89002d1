"""The house around the code: commands, documents, packages, floors, shipped recipes."""
