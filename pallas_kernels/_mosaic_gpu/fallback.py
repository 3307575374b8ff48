"""Which launches the Mosaic GPU kernels leave to their fallback: Triton's kernels, or XLA's."""

from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._spec import Spec


def leaves_to_fallback(spec: Spec, inputs: ForwardInputs | BackwardInputs) -> bool:
    """Whether queries see keys after themselves, and there are documents or sink tokens too."""
    documents_end = inputs.end is not None and inputs.end.ndim > 0
    has_sinks = spec.num_sinks > 0 or inputs.sinks is not None
    return documents_end or (spec.lookahead > 0 and has_sinks)
