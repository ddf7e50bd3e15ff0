"""Tests of configurations, models and processors. No tests of decoders and pipelines."""
