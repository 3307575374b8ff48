"""Tests of ring_swa_jax."""
