"""How influence decays with distance in time: what ``temporal_locality.py`` and its kin stand on."""
