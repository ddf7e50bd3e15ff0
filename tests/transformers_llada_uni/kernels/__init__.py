"""Tests of kernels against plain torch, in Triton's interpreter or on a GPU. No models."""
