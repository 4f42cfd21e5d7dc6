"""Model families as data: what a foreign config must say, and what it means here.

The facts are those of the released checkpoints' config.json and params.json files. foreign_config.py reads these
tables, released.py has the released sizes, convert.py each family's names of tensors.
"""

from typing import NamedTuple

Value = int | float | str | bool | None


class Family(NamedTuple):
    """How a Hugging Face config of one `model_type` maps to ModelConfig, and back.

    architecture: the class that transformers opens an export with; remote: its module and repository, where
    transformers itself has no such class.
    classifiers: what the names of transformers' classes for verifiers end in, in place of ForCausalLM.
    fields: config.json key -> (ModelConfig field, value of an absent key; None means required).
    facts: ModelConfig fields that are alike in the whole family.
    fixed: config.json key -> the values we implement; absent counts as the first.
    aliases: what other writers call a key of `fields` -> that key.
    flags: config.json key -> (ModelConfig field, its value where the key is true).
    window: the layers that `sliding_window` holds for: none, `all`, all `but each nth` (window_period), the `late`
    ones from max_window_layers; with `-if-used` only where use_sliding_window is true.
    window_default: sliding_window of a config that does not mention it.
    layer_types: whether transformers reads this key, which says the same layer by layer and rules over the others.
    original_context: original_max_position_embeddings of a config that does not state it on its own; transformers puts
    it over what is said with the rope.
    nope_period: each layer of this number has no rotary positions, unless `no_rope_layers` says which.
    interleaved: rotary pairs are neighbouring rows of wq and wk, as in our own layout; else the halves of a head.
    ffn_parts: how many FFN widths the config's intermediate_size counts.
    """

    architecture: str
    fields: dict[str, tuple[str, Value]]
    facts: dict[str, Value] = {}
    fixed: dict[str, tuple[Value | list[int], ...]] = {}
    aliases: dict[str, str] = {}
    flags: dict[str, tuple[str, Value]] = {}
    window: str = ""
    window_default: int | None = None
    window_period: int = 0
    layer_types: bool = False
    original_context: int = 0
    nope_period: int = 0
    interleaved: bool = False
    ffn_parts: int = 1
    remote: tuple[str, str, str] | None = None
    classifiers: tuple[str, ...] = ("ForSequenceClassification", "ForTokenClassification")


_FIELDS: dict[str, tuple[str, Value]] = {
    "hidden_size": ("dim", None),
    "num_hidden_layers": ("n_layers", None),
    "num_attention_heads": ("n_heads", None),
    "num_key_value_heads": ("n_kv_heads", None),
    "head_dim": ("head_dim", 0),  # 0: dim / n_heads
    "intermediate_size": ("ffn_dim", None),
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("max_seq_len", None),
    "rms_norm_eps": ("norm_eps", None),
    "rope_theta": ("rope_theta", None),
    "tie_word_embeddings": ("tied", False),
}
LOCAL_THETA = "rope_local_base_freq"  # the base of layers with a window
_BIASES = {"attention_bias": ("attention_bias", False), "mlp_bias": ("mlp_bias", False)}
_EXPERTS = {"num_experts_per_tok": ("n_active_experts", None)}
_SILU = {"hidden_act": ("silu", "swish")}  # two names of one function
_NO_BIAS = {"attention_bias": (False,)}
# intermediate_size is of dense layers, which decoder_sparse_step 1 leaves none of
_QWEN_EXPERTS = {key: field for key, field in _FIELDS.items() if key != "intermediate_size"} | _EXPERTS | {
    "moe_intermediate_size": ("ffn_dim", None), "num_experts": ("n_experts", None),
    "norm_topk_prob": ("renormalised_experts", False)}
_ALL_SPARSE = _SILU | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
_GEMMA_FIELDS = _FIELDS | {"head_dim": ("head_dim", None), "tie_word_embeddings": ("tied", True)}
_GEMMA_FACTS = {"activation": "gelu_tanh", "norm_offset": True, "scaled_embeddings": True}
_GELU = ("gelu_pytorch_tanh",)
_WINDOW = {"window_default": 4096, "layer_types": True}

_MISTRAL_LIKE = Family("MistralForCausalLM", _FIELDS, fixed=_SILU, window="all", **_WINDOW)
_OLMO_2 = Family(
    "Olmo2ForCausalLM", _FIELDS | {"attention_bias": ("attention_bias", False)},
    facts={"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True}, fixed=_SILU,
    classifiers=("ForSequenceClassification",))

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _FIELDS | _BIASES | {
            "num_key_value_heads": ("n_kv_heads", 0),  # 0: n_heads
            "max_position_embeddings": ("max_seq_len", 2048), "rms_norm_eps": ("norm_eps", 1e-6),
            "rope_theta": ("rope_theta", 10000.0)},
        fixed=_SILU),
    "smollm3": Family(
        "SmolLM3ForCausalLM", _FIELDS | _BIASES | {
            "rope_theta": ("rope_theta", 2000000.0), "tie_word_embeddings": ("tied", True)},
        fixed=_SILU | {"use_sliding_window": (False,)}, nope_period=4),
    "granite": Family(
        "GraniteForCausalLM", _FIELDS | _BIASES | {
            "embedding_multiplier": ("embedding_multiplier", 1.0),
            "attention_multiplier": ("attention_multiplier", 1.0),
            "residual_multiplier": ("residual_multiplier", 1.0), "logits_scaling": ("logit_divisor", 1.0)},
        fixed=_SILU, classifiers=()),
    "phi3": Family(
        "Phi3ForCausalLM", _FIELDS | {"partial_rotary_factor": ("partial_rotary_factor", 1.0)}, fixed=_SILU,
        window="all", original_context=4096),
    "olmo2": _OLMO_2,
    # the window's layers keep the plain positions that yarn stretches in the others
    "olmo3": _OLMO_2._replace(
        architecture="Olmo3ForCausalLM", fields=_OLMO_2.fields | {"rope_theta": ("rope_theta", 500000.0)},
        facts=_OLMO_2.facts | {"window_rope_theta": 500000.0},
        fixed=_OLMO_2.fixed | {LOCAL_THETA: (500000.0,)},  # of rope_parameters; no key of its own is read
        window="but each nth", window_period=4, **_WINDOW),
    "mistral": _MISTRAL_LIKE,
    # what transformers makes of a mistral config with layer_types, and what it then saves
    "ministral": _MISTRAL_LIKE._replace(architecture="MinistralForCausalLM"),
    "mixtral": Family(
        "MixtralForCausalLM", _FIELDS | _EXPERTS | {"num_local_experts": ("n_experts", None)},
        facts={"renormalised_experts": True}, fixed=_SILU, window="all"),
    "qwen": Family(
        "QWenLMHeadModel", {
            "hidden_size": ("dim", None), "num_hidden_layers": ("n_layers", None),
            "num_attention_heads": ("n_heads", None), "kv_channels": ("head_dim", None),
            "intermediate_size": ("ffn_dim", None), "vocab_size": ("vocab_size", None),
            "seq_length": ("max_seq_len", None), "layer_norm_epsilon": ("norm_eps", None),
            "rotary_emb_base": ("rope_theta", 10000.0), "tie_word_embeddings": ("tied", False),
            "use_logn_attn": ("logn_attention", True)},
        facts={"qkv_bias": True},
        fixed={"rope_scaling": (None, {}), "no_bias": (True,), "rotary_pct": (1.0,), "scale_attn_weights": (True,)},
        flags={"use_dynamic_ntk": ("rope_type", "dynamic")}, ffn_parts=2,
        remote=("Qwen/Qwen-7B", "configuration_qwen.QWenConfig", "modeling_qwen.QWenLMHeadModel"), classifiers=()),
    "qwen2": Family(
        "Qwen2ForCausalLM", _FIELDS, facts={"qkv_bias": True}, fixed=_SILU, window="late-if-used", **_WINDOW),
    "qwen3": Family(
        "Qwen3ForCausalLM", _FIELDS | {"head_dim": ("head_dim", None)}, facts={"qk_norm": True},
        fixed=_SILU | _NO_BIAS, window="late-if-used", **_WINDOW),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", _QWEN_EXPERTS | {"shared_expert_intermediate_size": ("shared_ffn_dim", 5632)},
        facts={"qkv_bias": True}, fixed=_ALL_SPARSE | {"qkv_bias": (True,), "use_sliding_window": (False,)},
        window="all-if-used", window_default=4096),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _QWEN_EXPERTS, facts={"qk_norm": True}, aliases={"num_local_experts": "num_experts"},
        fixed=_ALL_SPARSE | _NO_BIAS, window="all-if-used", window_default=4096),
    "gemma": Family(
        "GemmaForCausalLM", _GEMMA_FIELDS, facts=_GEMMA_FACTS,
        fixed=_NO_BIAS | {"hidden_act": _GELU, "use_bidirectional_attention": (None, False)}),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA_FIELDS | {
            "query_pre_attn_scalar": ("query_pre_attn_scalar", None),
            "attn_logit_softcapping": ("attention_softcap", None), "final_logit_softcapping": ("logit_softcap", None)},
        facts=_GEMMA_FACTS | {"post_norms": True},
        fixed=_NO_BIAS | {"hidden_activation": _GELU, "use_bidirectional_attention": (None, False)},
        window="but each nth", window_period=2, **_WINDOW),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _GEMMA_FIELDS | {
            "rope_theta": ("rope_theta", 1000000.0), LOCAL_THETA: ("window_rope_theta", 10000.0),
            "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
            "final_logit_softcapping": ("logit_softcap", 0.0)},
        facts=_GEMMA_FACTS | {"post_norms": True, "qk_norm": True},
        fixed=_NO_BIAS | {
            "hidden_activation": _GELU, "use_bidirectional_attention": (False, None), "sliding_window_pattern": (6,),
            "attn_logit_softcapping": (None,)},  # transformers reads it into the config, and computes without it
        window="but each nth", window_period=6, **_WINDOW, classifiers=("TextForSequenceClassification",)),
    "glm4": Family(
        "Glm4ForCausalLM", _FIELDS | {
            "partial_rotary_factor": ("partial_rotary_factor", 0.5), "attention_bias": ("qkv_bias", True)},
        facts={"post_norms": True}, fixed=_SILU, interleaved=True),
    "internlm2": Family(
        "InternLM2ForCausalLM", _FIELDS, fixed=_SILU | {"bias": (False,)},
        remote=("internlm/internlm2-7b", "configuration_internlm2.InternLM2Config",
                "modeling_internlm2.InternLM2ForCausalLM"), classifiers=()),
}

PLAIN = "llama"  # the family that every field's default describes

# Families that are known and not computed: model_type -> the part that is missing.
UNSUPPORTED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2"), "multi-head latent attention"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"), "gated delta nets"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_h1", "granitemoehybrid", "bamba"), "state space layers"),
    **dict.fromkeys(("gemma3", "mistral3", "llama4", "qwen2_5_vl", "qwen3_vl"), "an image encoder"),
    "gpt_oss": "attention sinks",
    "phimoe": "sparse mixing of two experts",
}

MAX_WINDOW_LAYERS = 28  # what transformers takes for a max_window_layers that is not there

# rope_type of a config.json -> rope_type here, and its parameters: key -> (ModelConfig field, value of an absent key;
# None means required).
_ROPE_FACTOR: dict[str, tuple[str, Value]] = {"factor": ("rope_factor", None)}
_ROPE_CONTEXT: dict[str, tuple[str, Value]] = {"original_max_position_embeddings": ("rope_original_max_seq_len", None)}
_ROPE_SCALE: dict[str, tuple[str, Value]] = {"attention_factor": ("rope_attention_factor", 0.0)}
_LONGROPE = ("longrope", _ROPE_CONTEXT | _ROPE_SCALE | {
    "short_factor": ("rope_short_factors", None), "long_factor": ("rope_long_factors", None)})
ROPE_TYPES: dict[str, tuple[str, dict[str, tuple[str, Value]]]] = {
    "linear": ("linear", _ROPE_FACTOR),
    "dynamic": ("dynamic", _ROPE_FACTOR),
    "llama3": ("wavelength", _ROPE_FACTOR | {
        "low_freq_factor": ("rope_low_freq_factor", None),
        "high_freq_factor": ("rope_high_freq_factor", None)} | _ROPE_CONTEXT),
    "yarn": ("yarn", _ROPE_FACTOR | {
        "beta_slow": ("rope_low_freq_factor", 1.0),
        "beta_fast": ("rope_high_freq_factor", 32.0)} | _ROPE_CONTEXT | _ROPE_SCALE),
    "longrope": _LONGROPE,
    "su": _LONGROPE,  # in the first files of Phi-3
}
