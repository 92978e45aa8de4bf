"""Modalities: each file answers how to find items, load a batch, encode by default, transform, and show an item."""

from attar.modalities import image

MODALITIES = {"image": image}
