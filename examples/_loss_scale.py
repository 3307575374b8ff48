"""Loss scaling, which training in float16 needs.

The gradient of one logit is its error divided by the number of tokens. With 8192 tokens in the
vocabulary and as many in a step most of them are 1.5e-8, and float16 rounds what is below 3e-8 to
zero. So the loss is multiplied by a large number before the backward pass, and the gradients, in
float32 by then, are divided by it. Where the number is too large, gradients are infinite: such a
step changes nothing, and the next one takes half the number. bfloat16 has the range of float32 and
needs none of this.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

_FIRST_SCALE = 2.0**15
# The number is doubled after as many steps with finite gradients.
_GROWTH_INTERVAL = 200


class LossScaleState(NamedTuple):
    """The state of an optimizer with loss scaling; checkpoints hold it with the rest."""

    scale: jax.Array
    finite_steps: jax.Array
    """Steps with finite gradients since the number last changed."""
    inner: Any


def with_loss_scale(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for gradients of the scaled loss; steps that overflow change nothing else."""

    def init(parameters: optax.Params) -> LossScaleState:
        return LossScaleState(jnp.float32(_FIRST_SCALE), jnp.int32(0), inner.init(parameters))

    def update(
        gradients: optax.Updates, state: LossScaleState, parameters: optax.Params | None = None
    ) -> tuple[optax.Updates, LossScaleState]:
        gradients = jax.tree.map(lambda x: x / state.scale, gradients)
        finite = jnp.isfinite(optax.tree.norm(gradients))
        updates, after = jax.lax.cond(
            finite,
            lambda: inner.update(gradients, state.inner, parameters),
            lambda: (jax.tree.map(jnp.zeros_like, gradients), state.inner),
        )
        steps = jnp.where(finite, state.finite_steps + 1, 0)
        grows = steps == _GROWTH_INTERVAL
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        scale = jnp.maximum(state.scale * factor, 1.0)
        return updates, LossScaleState(scale, jnp.where(grows, 0, steps), after)

    return optax.GradientTransformation(init, update)


def loss_scale(optimizer: nnx.Optimizer) -> jax.Array | float:
    """What the loss is to be multiplied by in the next step; 1 without loss scaling."""
    state = optimizer.opt_state
    return state.scale[...] if isinstance(state, LossScaleState) else 1.0
