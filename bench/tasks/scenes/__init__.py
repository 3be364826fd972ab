"""Scenes that are drawn: where artifact removal and driving have their pixels from."""
