"""cuDNN's attention as one launch forward and one backward, and what to build around them.

`jax.nn.dot_product_attention` gives no gradient of its log-sum-exp. So parts of the keys that are
attended in launches of their own, and learned sinks, are put together here, as they are in ring
attention: every backward launch takes the log-sum-exp of all keys and the whole output, from which
cuDNN computes the very gradients of its part.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float


class Attended(NamedTuple):
    """Output, and the float32 log-sum-exp of the logits."""

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B N T"]


class Gradients(NamedTuple):
    """Of a launch's queries, keys and values."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One call of cuDNN; query and key number 0 are aligned.

    Attributes:
        scale: of the logits.
        causal: whether query i sees no key after i.
        window: how many keys before its own it sees, None for all.
    """

    scale: float
    causal: bool = True
    window: int | None = None

    def _settings(self) -> tuple[Any, dict[str, Any]]:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        mask = cudnn.MaskType.CAUSAL if self.causal else cudnn.MaskType.NO_MASK
        window = None if self.window is None else self.window + 1
        return cudnn, {"scale": self.scale, "mask_type": mask, "sliding_window_length": window}

    def forward(self, query: Array, key: Array, value: Array) -> Attended:
        """Attends."""
        if jax.default_backend() == "cpu":
            return self._dense(query, key, value)
        cudnn, settings = self._settings()
        return Attended(
            *cudnn.dot_product_attention(query, key, value, **settings, return_residual=True)
        )

    def backward(
        self, query: Array, key: Array, value: Array, attended: Attended, dout: Array
    ) -> Gradients:
        """Gradients of its part; ``attended`` is of all keys and the learned sinks."""
        if jax.default_backend() == "cpu":
            return self._dense_backward(query, key, value, attended, dout)
        cudnn, settings = self._settings()
        no = jnp.zeros(0, query.dtype)
        found = cudnn._dot_product_attention_bwd_p_wrapper.bind(
            query, key, value, no, no, no, no, no, no, no, attended.lse, attended.out, dout,
            seed=42, dropout_rate=0.0, variadic_args=(False, False),
            layout=cudnn.AttentionLayout.BTNH.value, **settings,
        )  # fmt: skip
        return Gradients(*found[:3])

    def _logits(self, query: Array, key: Array) -> Float[Array, "B N T S"]:
        key = _per_query_head(key, query)
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * self.scale
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])[None]
        sees = distance >= 0 if self.causal else jnp.full(distance.shape, True)
        if self.window is not None:
            sees &= distance <= self.window
        return jnp.where(sees[None, None], logits.astype(jnp.float32), -jnp.inf)

    def _dense(self, query, key, value):
        """In place of cuDNN on a CPU, for tests."""
        logits = self._logits(query, key)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse[..., None]).astype(query.dtype)
        return Attended(jnp.einsum("bnts,bsnh->btnh", weights, _per_query_head(value, query)), lse)

    def _dense_backward(self, query, key, value, attended, dout):
        weights = jnp.exp(self._logits(query, key) - attended.lse[..., None])
        delta = jnp.einsum("btnh,btnh->bnt", attended.out, dout)
        dweights = jnp.einsum("btnh,bsnh->bnts", dout, _per_query_head(value, query))
        dlogits = weights * (dweights - delta[..., None]) * self.scale

        def of_kv_heads(x):
            return x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[3]).sum(3)

        dquery = jnp.einsum("bnts,bsnh->btnh", dlogits, _per_query_head(key, query))
        dkey = of_kv_heads(jnp.einsum("bnts,btnh->bsnh", dlogits, query))
        dvalue = of_kv_heads(jnp.einsum("bnts,btnh->bsnh", weights, dout))
        return Gradients(*(x.astype(query.dtype) for x in (dquery, dkey, dvalue)))


def _per_query_head(x: Array, query: Array) -> Array:
    return jnp.repeat(x, query.shape[2] // x.shape[2], axis=2)


def merged(one: Attended, other: Attended) -> Attended:
    """Of the keys of both."""
    lse = jnp.logaddexp(one.lse, other.lse)
    out = _weighted(one, lse) + _weighted(other, lse)
    return Attended(out.astype(one.out.dtype), lse)


def _weighted(part: Attended, lse: Array) -> Array:
    """The output's share in one of more keys, in float32."""
    weight = jnp.exp(part.lse - lse).swapaxes(1, 2)[..., None]
    return part.out.astype(jnp.float32) * weight


Forward = Callable[[Array, Array, Array], Attended]
Backward = Callable[[Array, Array, Array, Attended, Array], Gradients]


def differentiable(forward: Forward, backward: Backward):
    """``attend(query, key, value, sink_logits)`` of launches, with learned sinks or None.

    Output and log-sum-exp are named "context", as ours are, so that remat keeps them.
    """

    def attend_forward(query, key, value, sinks):
        attended = forward(query, key, value)
        if sinks is not None:
            lse = jnp.logaddexp(attended.lse, sinks.astype(jnp.float32)[None, :, None])
            out = _weighted(attended, lse).astype(query.dtype)
            attended = Attended(out, lse)
        attended = Attended(*(checkpoint_name(x, "context") for x in attended))
        return attended.out, (query, key, value, sinks, attended)

    def attend_backward(residuals, dout):
        query, key, value, sinks, attended = residuals
        gradients = backward(query, key, value, attended, dout)
        if sinks is None:
            return *gradients, None
        wide = (x.astype(jnp.float32) for x in (attended.out, dout))
        delta = jnp.einsum("btnh,btnh->bnt", *wide)
        share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - attended.lse)
        return *gradients, -(share * delta).sum((0, 2)).astype(sinks.dtype)

    attend = jax.custom_vjp(lambda *inputs: attend_forward(*inputs)[0])
    attend.defvjp(attend_forward, attend_backward)
    return attend
