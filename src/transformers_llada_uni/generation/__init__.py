"""Generation by block diffusion: `generate`, its settings, the canvas, a step, its policy, prefix and runner."""
