"""Tests of noise, masks and losses against literal formulas."""
