"""Tests of pallas_kernels, room by room."""
