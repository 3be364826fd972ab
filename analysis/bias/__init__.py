"""The picture of ``gradient_bias.py``."""
