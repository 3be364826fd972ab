"""Parts of the measurement of gradients truncated in space."""
