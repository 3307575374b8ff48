"""Reads a config.json key by key and refuses keys that were not understood."""

import re
from collections.abc import Mapping
from typing import Any

# Keys with such a word may change the attention; in a known model type they must be understood.
_DECIDING = re.compile(
    r"attn|attention|window|rope|rotary|theta|head|kv|qk|query|sink|norm|gat(e|ing)\b|bidirection"
    r"|is_causal|position|v_dim|softcap|swa_|value_scale|layers_block|block_types"
)
# Keys with such a word, or common keys, that do not affect a text model's attention layers.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    add_cross_attention attention_dropout attention_probs_dropout_prob attn_pdrop head_bias
    layer_norm_eps norm_epsilon max_position_embeddings norm_bias norm_eps norm_topk_prob
    normalize_embedding output_attentions post_norm_eps route_norm use_sandwich_norm _name_or_path
    architectures aux_loss_alpha bos_token_id cache_implementation chunk_size_feed_forward
    classifier_activation classifier_bias classifier_dropout classifier_pooling cls_token_id
    conv1d_width conv_L_cache conv_bias decoder_sparse_step dtype embd_pdrop embedding_dropout
    embedding_multiplier eos_token_id expert_layer_offset expert_layer_period
    final_logit_softcapping first_k_dense_replace hidden_act hidden_activation hidden_dropout
    id2label initializer_cutoff_factor initializer_range intermediate_size is_decoder
    is_encoder_decoder label2id logit_scale logits_scaling mlp_bias mlp_layer_types mlp_only_layers
    model_type moe_intermediate_size n_group n_routed_experts n_shared_experts name_or_path
    num_dense_layers num_experts num_experts_per_tok num_local_experts num_nextn_predict_layers
    num_shared_experts output_hidden_states output_router_logits pad_token_id resid_pdrop
    residual_dropout residual_multiplier return_dict route_scale routed_scaling_factor
    router_aux_loss_coef router_gate_bias router_jitter_noise score_func scoring_func sep_token_id
    shared_expert_intermediate_size sparsity swiglu_limit task_specific_params tie_word_embeddings
    topk_group topk_method torch_dtype transformers_version use_cache vocab_size
    """.split()  # noqa: SIM905  thirty lines otherwise
)


class Reader:
    """The attention's part of a config.json.

    Args:
        config: the file's mapping, or the ``text_config`` in it where the model has more than text.
        defaults: values of keys that the file leaves out, those of the model type's own class.
        aliases: from a key to another name, which is read where the key itself is missing.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, str],
    ):
        self._config, self._defaults, self._aliases = config, defaults, aliases
        self._read: set[str] = set()

    @property
    def model_type(self) -> str:
        """As the config says it."""
        return self._config.get("model_type", "")

    def get(self, key: str, default: Any = None) -> Any:
        """The config's value of a key, else the model type's default, else ``default``.

        A null in the config gives ``default``, not the model type's default.
        """
        names = (key, self._aliases.get(key, key))
        self.ignore(*names)
        for name in names:
            if name in self._config:
                return default if self._config[name] is None else self._config[name]
        return self._defaults.get(key, default)

    def says(self, key: str) -> bool:
        """Whether the config itself has the key."""
        return self._config.get(key) is not None

    def ignore(self, *keys: str) -> None:
        """Counts keys as understood."""
        self._read.update(keys)

    def need(self, key: str) -> Any:
        """The value of a required key; ValueError where it has none."""
        value = self.get(key)
        if value is None:
            raise ValueError(
                f"the config of model_type={self.model_type!r} has no {key!r}; pass the mapping of "
                f"the text decoder's own config, which has it. Its keys: {sorted(self._config)}"
            )
        return value

    def refuse(self, key: str, why: str) -> NotImplementedError:
        """The error that names a key and its value."""
        return NotImplementedError(
            f"{key}={self.get(key)!r} of model_type={self.model_type!r}: {why}"
        )

    def refuse_unread(self, *, known_type: bool) -> None:
        """Checks that every key that may concern the attention was read.

        Raises:
            NotImplementedError: naming key and value.
        """
        left = {
            key: value
            for key, value in self._config.items()
            if key not in self._read | _HARMLESS
            and value not in (None, False, [], {})
            and (not known_type or _DECIDING.search(key))
        }
        if not left:
            return
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(left.items()))
        if known_type:
            raise NotImplementedError(
                f"not understood in a config of model_type={self.model_type!r}: {shown}"
            )
        raise NotImplementedError(
            f"model_type={self.model_type!r} is not known, and neither is what these keys ask of "
            f"its attention: {shown}; leave out of the mapping those that do not touch it"
        )
