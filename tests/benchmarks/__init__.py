"""Tests that the benchmarks run, at a tiny size. They assert no times."""
