"""A Space with the demo: of the emoji model, or of what its variable `MODEL` names."""

import os

from llada_uni.demo.app import Demo
from llada_uni.pipeline_loading import load_pipeline


demo = Demo(load_pipeline(os.environ.get("MODEL", "emoji")))

if __name__ == "__main__":
    demo.launch()
