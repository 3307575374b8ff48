"""Kernels in Pallas-Triton, for GPUs from Ampere on.

`kernels` is the backend, `plans` chooses the `tiles` by their `shared_memory`. The kernels:

- `forward` and `backward_dq`, by tiles of queries; they share `query_launch` and `key_loop`;
- `backward_dkv`, by tiles of keys, with `dkv_program`; and `backward_sinks`, for sinks that many
  queries see; they share `query_tiles`;
- `decode`, for one token a row.

All load, store and multiply by `blocks`.
"""
