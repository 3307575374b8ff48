"""Tests of the Mosaic GPU backward kernels."""
