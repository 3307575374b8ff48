"""The head sizes that the GPU kernels take."""

from jax import Array


def check_head_dims(implementation: str, query: Array, value: Array) -> None:
    """Checks the sizes of heads.

    Raises:
        NotImplementedError: one is not a multiple of 16 up to 256; names it.
    """
    for name, dim in (("q and k", query.shape[-1]), ("v", value.shape[-1])):
        if dim % 16 or dim > 256:
            raise NotImplementedError(
                f"implementation={implementation!r} takes head dims that are multiples of 16 up to "
                f"256, got {dim} of {name}"
            )
