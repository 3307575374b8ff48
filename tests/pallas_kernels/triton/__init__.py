"""Tests of the Pallas-Triton kernels."""
