"""Low-bit language models for ESPnet."""

__version__ = "0.1.0"
