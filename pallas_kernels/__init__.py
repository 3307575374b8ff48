"""Attention kernels for one shard: tiles and dtypes, no meshes."""

from pallas_kernels._attention import Halo as Halo
from pallas_kernels._attention import attend as attend
from pallas_kernels._implementations import NAMES as IMPLEMENTATIONS
from pallas_kernels._implementations import choose as choose
from pallas_kernels._spec import SinkRun as SinkRun
from pallas_kernels._spec import Spec as Spec
from pallas_kernels._spec import accumulator_dtype as accumulator_dtype
from pallas_kernels._support import interprets as interprets

__all__ = [
    "IMPLEMENTATIONS",
    "Halo",
    "SinkRun",
    "Spec",
    "accumulator_dtype",
    "attend",
    "choose",
    "interprets",
]
