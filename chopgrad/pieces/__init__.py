"""Pieces of steps that a VAE's decoder and its encoder have in common."""
