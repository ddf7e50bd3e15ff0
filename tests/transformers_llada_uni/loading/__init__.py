"""Tests of how weights are loaded, quantised, offloaded and written."""
