"""Ring sliding-window and streaming-LLM attention for sequences cut over many devices."""

from pallas_kernels import half_precision_dtype as half_precision_dtype
from ring_swa_jax import _plugins as _plugins  # warns of a GPU plug-in that does not fit
from ring_swa_jax._cache import Cache as Cache
from ring_swa_jax._cache import next_positions as next_positions
from ring_swa_jax._cache_new import init_cache as init_cache
from ring_swa_jax._cache_new import prefill_cache as prefill_cache
from ring_swa_jax._chunks import chunk_segment_ids as chunk_segment_ids
from ring_swa_jax._decode import decode_attention as decode_attention
from ring_swa_jax._hugging_face import settings_from_hugging_face as settings_from_hugging_face
from ring_swa_jax._hugging_face import weights_from_hugging_face as weights_from_hugging_face
from ring_swa_jax._hugging_face import weights_to_hugging_face as weights_to_hugging_face
from ring_swa_jax._model_layers import Checkpoint as Checkpoint
from ring_swa_jax._model_layers import ModelLayers as ModelLayers
from ring_swa_jax._models import layer_settings as layer_settings
from ring_swa_jax._models import models as models
from ring_swa_jax._processes import check_processes as check_processes
from ring_swa_jax._query_scaling import QueryScaling as QueryScaling
from ring_swa_jax._reference import reference_attention as reference_attention
from ring_swa_jax._repeated_work import RepeatedWorkWarning as RepeatedWorkWarning
from ring_swa_jax._ring import ring_sliding_window_attn as ring_sliding_window_attn
from ring_swa_jax._ring import ring_sliding_window_attn_varlen as ring_sliding_window_attn_varlen
from ring_swa_jax._ring import ring_streaming_llm_attn as ring_streaming_llm_attn
from ring_swa_jax._ring import ring_streaming_llm_attn_varlen as ring_streaming_llm_attn_varlen
from ring_swa_jax._rope import Rope as Rope
from ring_swa_jax._rope import apply_rope as apply_rope
from ring_swa_jax._rope_scaling import LinearScaling as LinearScaling
from ring_swa_jax._rope_scaling import Llama3Scaling as Llama3Scaling
from ring_swa_jax._rope_scaling import LongRopeScaling as LongRopeScaling
from ring_swa_jax._rope_scaling import ProportionalScaling as ProportionalScaling
from ring_swa_jax._rope_scaling import YarnScaling as YarnScaling
from ring_swa_jax._segments import segment_positions as segment_positions
from ring_swa_jax._sharded import ring_attention as ring_attention
from ring_swa_jax._trim import trim_cache as trim_cache
from ring_swa_jax._version import __version__ as __version__

__all__ = [
    "Cache",
    "Checkpoint",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "ModelLayers",
    "ProportionalScaling",
    "QueryScaling",
    "RepeatedWorkWarning",
    "Rope",
    "YarnScaling",
    "__version__",
    "apply_rope",
    "check_processes",
    "chunk_segment_ids",
    "decode_attention",
    "half_precision_dtype",
    "init_cache",
    "layer_settings",
    "models",
    "next_positions",
    "prefill_cache",
    "reference_attention",
    "ring_attention",
    "ring_sliding_window_attn",
    "ring_sliding_window_attn_varlen",
    "ring_streaming_llm_attn",
    "ring_streaming_llm_attn_varlen",
    "segment_positions",
    "settings_from_hugging_face",
    "trim_cache",
    "weights_from_hugging_face",
    "weights_to_hugging_face",
]
