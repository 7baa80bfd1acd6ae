"""Views of images: crop, resize, flip and colours in one pass; the mathematics is in this folder's README."""

from fasttrain_kernels.augment.draws import Column, Draws, packed

__all__ = ["Column", "Draws", "packed"]
