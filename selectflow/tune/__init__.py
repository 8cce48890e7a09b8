"""Sweeps over configurations: grids, random and adaptive search, here or at W&B."""
