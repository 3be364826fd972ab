"""Bounds of the truncation error, and toys with a closed form: for ``error_bound.py`` and ``toy_checks.py``."""
