"""Tests of the converter: both ways, bad files, interruptions."""
