"""The gradient that reaches a diffusion backbone: what ``backbone_gradient.py`` stands on."""
