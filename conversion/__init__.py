"""Conversion between the released LLaDA2.0-Uni layout and a diffusers pipeline folder."""
