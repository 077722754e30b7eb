"""Training data: images with metadata from folders and zips. Opening a set imports no torch."""

from chaindiff.data.images import ImageData, open_data

__all__ = ["ImageData", "open_data"]
