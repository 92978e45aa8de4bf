"""Modalities: each file says how to find items (SUFFIXES), how to load a batch (Loader), and how to show an item (show).

The encoder learned by default and the transforms are images' own for now: models/students.py and stages/augment/plan.py.
"""

from attar.modalities import image

MODALITIES = {"image": image}
