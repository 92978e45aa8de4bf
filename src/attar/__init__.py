"""attar: unlabelled data in, a small fast model out, with proof."""

__version__ = "0.1.0"
