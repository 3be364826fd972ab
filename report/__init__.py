"""What people look at, made from the records of ``results/``: index, figures, notebooks and one HTML page."""
