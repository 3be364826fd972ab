"""Where training with a biased gradient ends: what ``training_bias.py`` stands on."""
