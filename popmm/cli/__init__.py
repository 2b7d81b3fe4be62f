"""The terminal: ``popmm generate | chat | inspect | eval | bench | demo``."""

from popmm.cli.main import main

__all__ = ["main"]
