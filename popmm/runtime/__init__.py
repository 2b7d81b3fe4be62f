"""A model's passes: which phase, which tokens, what is put on a model and taken off again."""
