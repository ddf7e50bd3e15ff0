"""Tests of likelihood bounds, lm-eval's model and visual question answering."""
