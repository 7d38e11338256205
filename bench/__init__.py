"""Benchmarks: `python -m sparsemae.bench step --help`."""
