"""Networks that are a signal: SMN (arXiv:2602.16337), its baselines, pixel grids and a small radiance field."""
