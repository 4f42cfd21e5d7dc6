"""Released sizes as data: the facts of their config.json and params.json files under the names of --model_type."""

from typing import NamedTuple

from src.checkpoint.families import Value


class Released(NamedTuple):
    """What --model_type claims: the family, and facts of ModelConfig. Facts left out are the family's."""

    family: str
    facts: dict[str, int | float | str | bool]


def _sizes(family: str, shared: dict[str, Value], rows: dict[str, tuple[Value, ...]]) -> dict[str, Released]:
    """Rows of (dim, n_layers, n_heads, n_kv_heads, ffn_dim, further facts) under their released names."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
    return {name: Released(family, dict(zip(names, row[:5], strict=True)) | shared | dict(row[5:]))
            for name, row in rows.items()}


_7B = (4096, 32, 32, 32, 11008)
_13B = (5120, 40, 40, 40, 13824)
_33B = (6656, 60, 52, 52, 17920)
_34B = (8192, 48, 64, 8, 22016)
_65B = (8192, 80, 64, 64, 22016)
_70B = (8192, 80, 64, 8, 28672)
_8B = (4096, 32, 32, 8, 14336)
_LLAMA_2 = {"vocab_size": 32000, "norm_eps": 1e-5, "rope_theta": 1e4}
_LLAMA_3 = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5}
_LLAMA_31 = _LLAMA_3 | {"rope_type": "wavelength", "rope_factor": 8.0}
_LLAMA_32 = _LLAMA_31 | {"rope_factor": 32.0, "tied": True}
_CODE = {"norm_eps": 1e-5, "rope_theta": 1e6}
_DEEPSEEK = {"vocab_size": 102400, "norm_eps": 1e-6, "rope_theta": 1e4}
_CODER = {"vocab_size": 32256, "norm_eps": 1e-6, "rope_theta": 1e5, "rope_type": "linear", "rope_factor": 4.0}
_MISTRAL = {"vocab_size": 32000, "norm_eps": 1e-5, "rope_theta": 1e6}
_QWEN = {"vocab_size": 151936, "norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN_25 = {"vocab_size": 151936, "rope_theta": 1e6}  # base and instruct models differ in norm_eps
_QWEN_3 = _QWEN | {"head_dim": 128}
_GEMMA = {"vocab_size": 256000, "norm_eps": 1e-6, "rope_theta": 1e4, "tied": True, "head_dim": 256}
_GEMMA_2 = _GEMMA | {"attention_softcap": 50.0, "logit_softcap": 30.0}
_INTERNLM_2 = {"vocab_size": 92544, "norm_eps": 1e-5, "rope_theta": 1e6}
_SMOLLM_3 = {"vocab_size": 128256, "norm_eps": 1e-6, "rope_theta": 5e6, "tied": True}
_PHI_3 = {"vocab_size": 32064, "norm_eps": 1e-5, "rope_theta": 1e4, "window": 2047}
_PHI_4 = {"vocab_size": 100352, "norm_eps": 1e-5, "rope_theta": 2.5e5}
_OLMO_2 = {"vocab_size": 100352, "norm_eps": 1e-6, "rope_theta": 5e5}
_GEMMA_3 = _GEMMA | {
    "vocab_size": 262144, "rope_theta": 1e6, "window_rope_theta": 1e4, "query_pre_attn_scalar": 256, "window": 512}
_TIED, _WIDE_VOCAB = ("tied", True), ("vocab_size", 152064)

# Names without a size claim the family alone. A row's name may be followed by -base, -chat, -instruct or -it.
MODEL_TYPES: dict[str, Released] = (
    {name: Released(family, {}) for name, family in {
        "llama": "llama", "mistral": "mistral", "mixtral": "mixtral", "qwen": "qwen", "qwen-1.5": "qwen2",
        "qwen-2": "qwen2", "qwen-2.5": "qwen2", "qwen-3": "qwen3", "qwen-3-moe": "qwen3_moe", "deepseek": "llama",
        "gemma": "gemma", "gemma-2": "gemma2", "gemma-3": "gemma3_text", "glm-4": "glm4", "granite": "granite",
        "olmo-2": "olmo2", "olmo-3": "olmo3", "phi-3": "phi3", "phi-4-mini": "phi3", "qwen-1.5-moe": "qwen2_moe",
        "qwen-2-moe": "qwen2_moe", "internlm2": "internlm2"}.items()}
    | _sizes("llama", _LLAMA_2 | {"norm_eps": 1e-6}, {
        "llama-1-7b": _7B,
        "llama-1-13b": _13B,
        "llama-1-30b": _33B,
        "llama-1-33b": _33B,
        "llama-1-65b": (*_65B, ("norm_eps", 1e-5)),
    })
    | _sizes("llama", _LLAMA_2, {"llama-2-7b": _7B, "llama-2-13b": _13B, "llama-2-70b": _70B})
    | _sizes("llama", _LLAMA_3, {"llama-3-8b": _8B, "llama-3-70b": _70B})
    | _sizes("llama", _LLAMA_31, {"llama-3.1-8b": _8B, "llama-3.1-70b": _70B,
                                  "llama-3.1-405b": (16384, 126, 128, 8, 53248), "llama-3.3-70b": _70B})
    | _sizes("llama", _LLAMA_32, {"llama-3.2-1b": (2048, 16, 32, 8, 8192), "llama-3.2-3b": (3072, 28, 24, 8, 8192)})
    | _sizes("llama", _CODE, {
        "codellama-7b": (*_7B, ("vocab_size", 32016)),
        "codellama-13b": (*_13B, ("vocab_size", 32016)),
        "codellama-34b": (*_34B, ("vocab_size", 32000)),
        "llemma-7b": (*_7B, ("vocab_size", 32016), ("rope_theta", 1e4)),
        "llemma-34b": (*_34B, ("vocab_size", 32000)),
    })
    | _sizes("llama", _DEEPSEEK, {
        "deepseek-llm-7b": (4096, 30, 32, 32, 11008),
        "deepseek-llm-67b": (8192, 95, 64, 8, 22016),
        "deepseek-math-7b": (4096, 30, 32, 32, 11008),
    })
    | _sizes("llama", _CODER, {"deepseek-coder-1.3b": (2048, 24, 16, 16, 5504), "deepseek-coder-6.7b": _7B,
                               "deepseek-coder-33b": (7168, 62, 56, 8, 19200)})
    | _sizes("mistral", _MISTRAL, {
        "mistral-7b": (*_8B, ("rope_theta", 1e4), ("window", 4096)),
        "mistral-7b-v0.1": (*_8B, ("rope_theta", 1e4), ("window", 4096)),
        "mistral-7b-v0.3": (*_8B, ("vocab_size", 32768)),
        "mistral-7b-instruct-v0.1": (*_8B, ("rope_theta", 1e4), ("window", 4096)),
        "mistral-7b-instruct-v0.2": _8B,
        "mistral-7b-instruct-v0.3": (*_8B, ("vocab_size", 32768)),
    })
    | _sizes("mixtral", _MISTRAL | {"n_experts": 8, "n_active_experts": 2}, {
        "mixtral-8x7b-v0.1": _8B,
        "mixtral-8x7b-instruct-v0.1": _8B,
    })
    | _sizes("qwen", _QWEN | {"rope_theta": 1e4}, {
        "qwen-1.8b": (2048, 24, 16, 16, 5504),
        "qwen-7b": _7B,
        "qwen-14b": (5120, 40, 40, 40, 13696, _WIDE_VOCAB),
        "qwen-72b": (8192, 80, 64, 64, 24576, _WIDE_VOCAB, ("rope_theta", 1e6)),
    })
    | _sizes("qwen2", _QWEN, {
        "qwen-1.5-0.5b": (1024, 24, 16, 16, 2816, _TIED),
        "qwen-1.5-1.8b": (2048, 24, 16, 16, 5504),
        "qwen-1.5-7b": _7B,
        "qwen-1.5-14b": (5120, 40, 40, 40, 13696, _WIDE_VOCAB),
        "qwen-1.5-32b": (5120, 64, 40, 8, 27392, _WIDE_VOCAB),
        "qwen-1.5-72b": (8192, 80, 64, 64, 24576, _WIDE_VOCAB),
        "qwen-2-0.5b": (896, 24, 14, 2, 4864, _TIED),
        "qwen-2-1.5b": (1536, 28, 12, 2, 8960, _TIED),
        "qwen-2-7b": (3584, 28, 28, 4, 18944, _WIDE_VOCAB),
        "qwen-2-72b": (8192, 80, 64, 8, 29568, _WIDE_VOCAB),
    })
    | _sizes("qwen2", _QWEN_25, {
        "qwen-2.5-0.5b": (896, 24, 14, 2, 4864, _TIED),
        "qwen-2.5-1.5b": (1536, 28, 12, 2, 8960, _TIED),
        "qwen-2.5-3b": (2048, 36, 16, 2, 11008, _TIED),
        "qwen-2.5-7b": (3584, 28, 28, 4, 18944, _WIDE_VOCAB),
        "qwen-2.5-14b": (5120, 48, 40, 8, 13824, _WIDE_VOCAB),
        "qwen-2.5-32b": (5120, 64, 40, 8, 27648, _WIDE_VOCAB),
        "qwen-2.5-72b": (8192, 80, 64, 8, 29568, _WIDE_VOCAB),
        "qwen-2.5-math-1.5b": (1536, 28, 12, 2, 8960, _TIED, ("rope_theta", 1e4)),
        "qwen-2.5-math-7b": (3584, 28, 28, 4, 18944, _WIDE_VOCAB, ("rope_theta", 1e4)),
    })
    | _sizes("qwen3", _QWEN_3, {
        "qwen-3-0.6b": (1024, 28, 16, 8, 3072, _TIED),
        "qwen-3-1.7b": (2048, 28, 16, 8, 6144, _TIED),
        "qwen-3-4b": (2560, 36, 32, 8, 9728, _TIED),
        "qwen-3-8b": (4096, 36, 32, 8, 12288),
        "qwen-3-14b": (5120, 40, 40, 8, 17408),
        "qwen-3-32b": (5120, 64, 64, 8, 25600),
    })
    | _sizes("qwen3_moe", _QWEN_3 | {"n_experts": 128, "n_active_experts": 8}, {
        "qwen-3-30b-a3b": (2048, 48, 32, 4, 768),
        "qwen-3-235b-a22b": (4096, 94, 64, 4, 1536),
    })
    | _sizes("gemma", _GEMMA, {"gemma-2b": (2048, 18, 8, 1, 16384), "gemma-7b": (3072, 28, 16, 16, 24576)})
    | _sizes("gemma2", _GEMMA_2, {
        "gemma-2-2b": (2304, 26, 8, 4, 9216, ("query_pre_attn_scalar", 256.0), ("window", 4096)),
        "gemma-2-9b": (3584, 42, 16, 8, 14336, ("query_pre_attn_scalar", 256.0), ("window", 4096)),
        "gemma-2-27b": (4608, 46, 32, 16, 36864, ("head_dim", 128), ("query_pre_attn_scalar", 144.0), ("window", 4096)),
    })
    | _sizes("gemma3_text", _GEMMA_3, {"gemma-3-270m": (640, 18, 4, 1, 2048), "gemma-3-1b": (1152, 26, 4, 1, 6912)})
    | _sizes("smollm3", _SMOLLM_3, {"smollm3-3b": (2048, 36, 16, 4, 11008)})
    | _sizes("phi3", _PHI_3, {"phi-3-mini-4k": (3072, 32, 32, 32, 8192), "phi-3-medium-4k": (5120, 40, 40, 10, 17920)})
    | _sizes("phi3", _PHI_4, {"phi-4": (5120, 40, 40, 10, 17920)})
    | _sizes("olmo2", _OLMO_2, {"olmo-2-1b": (2048, 16, 16, 16, 8192), "olmo-2-7b": _7B, "olmo-2-13b": _13B,
                                "olmo-2-32b": (5120, 64, 40, 8, 27648)})
    | _sizes("internlm2", _INTERNLM_2, {"internlm2-7b": _8B, "internlm2-20b": (6144, 48, 48, 8, 16384)}))
