"""LLaDA2.0-Uni for diffusers."""
