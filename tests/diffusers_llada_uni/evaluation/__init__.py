"""Tests of images drawn for prompts, and of their scores."""
