"""The nodes, run on the emoji model under a stand-in for ComfyUI."""
