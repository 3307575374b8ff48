"""The backward kernels. `choice` says which of them computes a launch; read it first.

By tiles of keys (`by_key_tiles`), for long windows and none:

- `fused` and `fused_consumer`, for heads of up to 128; `fused_wide_heads` and
  `fused_wide_heads_consumer`, for wider ones. They compute dq, dk and dv in one launch.
- What both share: `pipeline` (the launch), `producer` (the warpgroup that copies), `tile_masks`,
  `dq_accumulate` (how programs add up dq; in tiles for the first kernel, in slices for the second
  one), `dkv_reduce` (how they add up dk and dv).
- What a program computes, and when: `tasks` (start here), `scheduler`, `query_plans`,
  `task_splits`, `launch_schedule`. In the code a *schedule* is that of a launch, a *program* the
  schedule of one program.

For short windows (`by_short_windows`): `short_windows`, `short_windows_schedule`,
`short_windows_consumer`, and `short_windows_dq`, the producer that also computes dq.

After a kernel by tiles of keys: `dq_postprocess` scales and rounds dq; or, where windows do not
reach all sinks, `sinks` does, with `sinks_kernel`, `sinks_config` and `sinks_program`.

All use `launch`, `joined_runs` (a halo and own keys as one run) and `softmax`.
"""
