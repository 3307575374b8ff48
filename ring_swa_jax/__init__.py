"""Ring sliding-window and streaming-LLM attention for sequences cut over many devices."""

from ring_swa_jax._processes import check_processes as check_processes
from ring_swa_jax._reference import reference_attention as reference_attention
from ring_swa_jax._ring import ring_sliding_window_attn as ring_sliding_window_attn
from ring_swa_jax._ring import ring_sliding_window_attn_varlen as ring_sliding_window_attn_varlen
from ring_swa_jax._ring import ring_streaming_llm_attn as ring_streaming_llm_attn
from ring_swa_jax._ring import ring_streaming_llm_attn_varlen as ring_streaming_llm_attn_varlen
from ring_swa_jax._rope import apply_rope as apply_rope
from ring_swa_jax._segments import segment_positions as segment_positions
from ring_swa_jax._sharded import ring_attention as ring_attention

__all__ = [
    "apply_rope",
    "check_processes",
    "reference_attention",
    "ring_attention",
    "ring_sliding_window_attn",
    "ring_sliding_window_attn_varlen",
    "ring_streaming_llm_attn",
    "ring_streaming_llm_attn_varlen",
    "segment_positions",
]
