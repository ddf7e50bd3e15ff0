"""Tests of the language model's and the image tokenizer's trainers, on tiny models."""
