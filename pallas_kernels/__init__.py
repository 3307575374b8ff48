"""Attention kernels for one shard: tiles and dtypes, no meshes.

From the top down:

1. What is asked for: `_spec` (settings, runs of keys), `_halo` (keys that other devices hold).
2. Which launches there are, and in what order: `_attention`; `_both_sides`, where queries see keys
   after themselves; `_earlier_keys` and `_one_query`, with a cache. `_launches` is one launch.
3. What a backend computes in a launch: `_kernels`. Which backend: `_implementations`, `_support`,
   `_device`.
4. What all backends share: `_masks` (which keys a query sees), `_tile_ranges` and `_sink_ranges`
   (which tiles hold such keys), `_logits`.
5. The backends: `_xla` (the shortest; read it first), `_triton`, `_mosaic_gpu`. The docstring of
   each says what its modules are.

`_varying`, `_vmap` and `_derivatives` are about JAX's transformations. `_order` is about the order
in which XLA runs a program.
"""

from pallas_kernels._attention import attend as attend
from pallas_kernels._both_sides import Sides as Sides
from pallas_kernels._both_sides import attend_both_sides as attend_both_sides
from pallas_kernels._device import half_precision_dtype as half_precision_dtype
from pallas_kernels._earlier_keys import attend_after_keys as attend_after_keys
from pallas_kernels._halo import Halo as Halo
from pallas_kernels._implementations import NAMES as IMPLEMENTATIONS
from pallas_kernels._implementations import choose as choose
from pallas_kernels._implementations import overlaps_messages as overlaps_messages
from pallas_kernels._launches import attend_keys as attend_keys
from pallas_kernels._launches import attend_keys_backward as attend_keys_backward
from pallas_kernels._launches import sink_logits_gradient as sink_logits_gradient
from pallas_kernels._logits import delta_of as delta_of
from pallas_kernels._one_query import attend_one_query as attend_one_query
from pallas_kernels._one_query import has_one_query_kernel as has_one_query_kernel
from pallas_kernels._order import exists as exists
from pallas_kernels._spec import KeyRun as KeyRun
from pallas_kernels._spec import SinkRun as SinkRun
from pallas_kernels._spec import Spec as Spec
from pallas_kernels._spec import State as State
from pallas_kernels._spec import accumulator_dtype as accumulator_dtype
from pallas_kernels._support import interprets as interprets
from pallas_kernels._varying import vary_over as vary_over
from pallas_kernels._varying import varying_axes as varying_axes

__all__ = [
    "IMPLEMENTATIONS",
    "Halo",
    "KeyRun",
    "Sides",
    "SinkRun",
    "Spec",
    "State",
    "accumulator_dtype",
    "attend",
    "attend_after_keys",
    "attend_both_sides",
    "attend_keys",
    "attend_keys_backward",
    "attend_one_query",
    "choose",
    "delta_of",
    "exists",
    "half_precision_dtype",
    "has_one_query_kernel",
    "interprets",
    "overlaps_messages",
    "sink_logits_gradient",
    "vary_over",
    "varying_axes",
]
