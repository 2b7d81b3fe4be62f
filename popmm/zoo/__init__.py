"""Small trained models that come with popmm: real enough to see pruning, loaded offline in a second."""

from popmm.zoo.bundled import load, names, path, picture

__all__ = ["load", "names", "path", "picture"]
