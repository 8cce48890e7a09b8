"""Comparison of finished runs: numbers, a table and a chart."""
