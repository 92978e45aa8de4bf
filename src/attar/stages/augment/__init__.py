"""Augmentation: parameters become one matrix and one colour transform per view; strength and frequency are dials."""
