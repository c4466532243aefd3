"""The version of the package, which everything made by it names."""

__version__ = "0.1.0"
