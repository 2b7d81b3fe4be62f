"""matplotlib, for whoever draws."""

from __future__ import annotations


def pyplot():
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'popmm[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
