"""volumed: a persistent volume manager for containers."""

__version__ = "0.1.0"
