"""Measurements that hold the package to its figures: `python -m benchmarks`, one line per row, pass or fail."""
