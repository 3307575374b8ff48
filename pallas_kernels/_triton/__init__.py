"""Kernels in Pallas-Triton, for GPUs from Ampere on."""
