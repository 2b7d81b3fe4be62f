"""The terminal: ``popmm generate | chat | serve | inspect | eval | bench | demo | zoo``."""

from popmm.cli.main import main

__all__ = ["main"]
