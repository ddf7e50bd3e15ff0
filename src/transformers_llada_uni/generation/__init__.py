"""Generation by block diffusion: `generate` and its settings, the canvas, a step, its policy, its prefix, its runner."""
