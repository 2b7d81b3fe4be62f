"""The terminal: ``popmm generate | chat | serve | inspect | eval | bench | demo``."""

from popmm.cli.main import main

__all__ = ["main"]
