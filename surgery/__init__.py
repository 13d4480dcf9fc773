"""Offline surgery on language-model checkpoints: the library behind the ``moesurg`` command."""

__version__ = "0.1.0"
