"""Estimators of the gradient other than truncation: what ``estimators.py`` stands on."""
