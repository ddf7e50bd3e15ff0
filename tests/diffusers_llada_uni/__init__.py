"""Tests of the pipeline and of what it decodes with. No tests of the language model."""
