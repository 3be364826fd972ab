"""One script per question about the gradient; ``python -m analysis`` puts the whole theory to the test."""
