"""Peak memory and time of every gradient strategy: ``python -m bench`` (what ``tox -e bench`` runs)."""
