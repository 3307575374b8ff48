"""Tests of the Mosaic GPU kernels."""
