"""The horizon at infinity: record a run, sweep back over it, rank its samples."""
