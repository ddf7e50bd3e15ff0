"""Tests of the decoder's trainers, on tiny models."""
