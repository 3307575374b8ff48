"""The backend "xla": portable, O(T * W) work, no buffer larger than its arguments.

A loop over tiles of queries. Under a short window all keys that a tile sees are one slice, so
this is the only loop. Else an inner loop over the tiles of keys that a tile of queries sees goes on
with an online softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135).
Where the tile size does not divide a range, its last tile is moved back to end with the range, and
what it shares with its neighbour is masked, so nothing is padded.
"""

from jax import Array
from jaxtyping import Float

from pallas_kernels._kernels import BackwardInputs, Kernels
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._xla.backward import backward
from pallas_kernels._xla.forward import forward


class XlaKernels:
    """The backend "xla": it computes everything, on every device."""

    name = "xla"

    def check(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
    ) -> None:
        """Nothing is beyond it."""
        del spec, query, value

    def query_tile_rows(self, spec: Spec, query: Float[Array, "B T N H"], run: KeyRun) -> int:
        """Launches may begin at any row."""
        del spec, query, run
        return 1

    @property
    def prefers_fused_halo_forward(self) -> bool:
        """One launch is half the program to compile."""
        return True

    def prefers_fused_halo_backward(self, spec: Spec, inputs: BackwardInputs) -> bool:
        """One launch is half the program to compile."""
        del spec, inputs
        return True

    forward = staticmethod(forward)
    backward = staticmethod(backward)


KERNELS: Kernels = XlaKernels()
