"""Kernels in Mosaic GPU, for Hopper GPUs."""
