"""Tests of ring_swa_jax; a package, so that its helpers import one another from anywhere."""
