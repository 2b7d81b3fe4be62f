"""Small trained models that come with popmm, loaded offline in a second, and real ones made from the package index."""

from popmm.zoo.bundled import load, names, path, picture

__all__ = ["get", "load", "names", "path", "picture"]


def __getattr__(name: str):
    if name != "get":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from popmm.zoo.making import get

    return get
