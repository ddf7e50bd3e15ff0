"""Tests, which mirror the sources; what belongs to no part of them lies here. Deterministic, and never timed."""
