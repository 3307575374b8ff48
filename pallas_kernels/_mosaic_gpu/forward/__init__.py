"""The forward kernel, which is warp-specialised: one warpgroup copies, the others compute.

To read in this order: `kernel` (the launch), `scheduler`, `work_tile` and `tile_finder` (which
program takes which tiles of queries, and which keys these see), `config` (shared memory and
barriers), `producer` (the warpgroup that copies), `consumer` (one that computes), `softmax` (with
the masks), `padding` (zeros among the values), `epilogue`.
"""
