"""Random steps of decoding: new tokens after prompts of other lengths, beside the oracle."""

import dataclasses
import random

import jax.numpy as jnp
import numpy as np

import ring_swa_jax as rsj
from tests.helpers import oracle
from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.pool import compiled


@dataclasses.dataclass(frozen=True)
class DecodingJob:
    """A step. Its repr is Python: paste it into `tests.helpers.random_jobs.check`.

    Attributes:
        case: whole rows, prompts and new tokens, without documents.
        implementation: as everywhere.
        tokens: new tokens of each row.
        prompts: tokens of each row before these.
        share: of the new tokens that are no padding; None: there is none.
        max_length: of the cache.
        max_trim: of the cache.
    """

    case: Case
    implementation: str | None
    tokens: int
    prompts: tuple[int, ...]
    share: float | None = None
    max_length: int | None = None
    max_trim: int = 1

    def prepare(self):
        """(compiled program, its arguments, the oracle's Result)."""
        case, valid, positions = self.case, *self.valid_and_positions()
        (q, k, v, sink), dout = case.arrays()
        q, k, v, dout = (self._of_new(x, valid, positions, np.nan) for x in (q, k, v, dout))
        cache = self.cache()

        def attend(q, k, v, sink, _):
            return rsj.decode_attention(
                q, k, v, cache, **case.options,
                num_sink_tokens=case.sinks, sink_logits=sink,
                valid=None if self.share is None else jnp.asarray(valid),
                implementation=self.implementation,
            )[0]  # fmt: skip

        arguments = (q, k, v, sink, None, dout)
        return compiled(attend, arguments), arguments, self.expected(valid, positions)

    def cache(self):
        """The cache after the prompts, whose padding is NaN."""
        (_, k, v, _), _ = self.case.arrays()
        is_prompt = np.arange(max(1, *self.prompts)) < np.array(self.prompts)[:, None]
        k, v = (x[:, : is_prompt.shape[1]] for x in (k, v))
        return rsj.prefill_cache(
            *(jnp.where(is_prompt[..., None, None], x, jnp.nan) for x in (k, v)),
            segment_ids=np.where(is_prompt, 0, -1),
            window_size=self.case.window,
            num_sink_tokens=self.case.sinks,
            max_length=self.max_length,
            max_trim=self.max_trim,
        )

    def valid_and_positions(self):
        """[B, T]: which new tokens are no padding, and where in its row each of them is."""
        valid = np.ones((len(self.prompts), self.tokens), bool)
        if self.share is not None:
            valid = np.random.default_rng(self.case.seed).random(valid.shape) < self.share
        return valid, np.array(self.prompts)[:, None] + np.maximum(valid.cumsum(1) - 1, 0)

    def expected(self, valid, positions):
        """The oracle's Result of the new tokens: no other query counts."""
        case = self.case
        (*qkv, sink), dout = case.arrays()
        is_new = np.zeros((case.batch, case.length), bool)
        np.logical_or.at(is_new, (np.arange(case.batch)[:, None], positions), valid)
        dout = jnp.where(is_new[..., None, None], dout, 0)
        whole = oracle.attention(
            *(np.asarray(x.astype(jnp.float32), np.float64) for x in (*qkv, dout)),
            case.mask() & is_new[..., None],
            scale=case.scale, logits_soft_cap=case.softcap,
            sink_logits=None if sink is None else np.asarray(sink, np.float64),
        )  # fmt: skip
        new = (np.asarray(self._of_new(x, valid, positions, 0)) for x in whole[:4])
        return Result(*new, whole.dsink)

    def _of_new(self, x, valid, positions, fill):
        """The new tokens' part of whole rows, ``fill`` for padding."""
        where = np if isinstance(x, np.ndarray) else jnp
        rows = np.arange(self.case.batch)[:, None]
        return where.where(valid[..., None, None], x[rows, positions], fill)


def random_decoding_job(
    rng: random.Random, implementations: tuple, *, tokens=(1, 1, 64, 65, 100, 130, 200), dims
) -> DecodingJob:
    """A step of one token or of many; half of the batches are one row."""
    batch, count = rng.choice((1, 1, 2, 3)), rng.choice(tokens)
    prompts = tuple(rng.choice((0, 1, 2, 20, 63, 64, 65, 130)) for _ in range(batch))
    length = max(prompts) + count
    window = rng.choice((0, 1, 15, 40, 63, 64, 65, 127, 128, 129, 255, None))
    dtype = rng.choice(("bfloat16", "bfloat16", "float16"))
    case = Case(
        chunk=length,
        devices=1,
        window=window,
        sinks=rng.choice((0, 0, 1, 4, 16, 17, 65)),
        batch=batch,
        heads=rng.choice(((1, 1), (2, 1), (4, 2), (6, 2), (8, 1))),
        dims=rng.choice(dims),
        softcap=rng.choice((None, None, 2.0)),
        learned=rng.random() < 0.4,
        scale=rng.choice((None, 0.2, -0.1)),
        dtype=dtype,
        seed=rng.randrange(2**16),
    )
    return DecodingJob(
        case,
        rng.choice(implementations),
        count,
        prompts,
        share=rng.choice((None, None, 0.3, 0.8)),
        max_length=length + rng.choice((0, 60)) if window is None or rng.random() < 0.3 else None,
        max_trim=rng.choice((1, 1, 2, 29)),
    )
