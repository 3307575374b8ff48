"""Kernels in Pallas' Mosaic GPU, for Hopper.

`kernels` is the backend, `tiles` has the tile sizes, and `forward` and `backward` have a room each.
These build on `primitives` (layouts, shared memory, semaphores), `register_tiles` (float32 matrices
in memory), `padding` (zeros in padding rows) and `ragged_copies` (copies of arrays of any length).
"""
