"""Implementation "mosaic_gpu_nondeterministic": "mosaic_gpu" without a fixed order of additions.

Its gradients of queries differ in their last bits from run to run; all else is the same.
"""

from functools import partial

from pallas_kernels._mosaic_gpu import kernels
from pallas_kernels._mosaic_gpu.kernels import check, forward, joins, query_tile_rows

__all__ = ["backward", "check", "forward", "joins", "query_tile_rows"]


backward = partial(kernels.backward, ordered=False)
