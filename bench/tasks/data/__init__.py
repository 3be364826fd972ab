"""Clips of the tasks: footage, degradation, and what is kept of them."""
