"""Tests of how rows of datasets become token ids. No trainers."""
