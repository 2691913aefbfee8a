"""The command line. `main` is the entry point of the console script."""

from latentdiff.cli.app import main

__all__ = ["main"]
