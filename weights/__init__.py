"""The embedded VAEs, and the scripts that train and evaluate them."""
