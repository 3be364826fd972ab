"""Perceptual networks with the authors' numbers, for losses and for metrics."""
