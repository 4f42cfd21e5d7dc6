"""Meta's params.json, or the model_args in a file, to ModelConfig. Mistral AI's first releases have one too."""

from src.checkpoint.families import PLAIN
from src.checkpoint.foreign_config import is_true
from src.checkpoint.params import above_zero
from src.errors import UserError
from src.models.config import ModelConfig

# Keys that are read, and those of which nothing is computed.
_READ = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier",
    "vocab_size", "max_seq_len", "max_position_embeddings", "norm_eps", "rope_theta", "use_scaled_rope",
    "rope_scaling_factor", "rope_high_freq_factor", "sliding_window", "moe", "tied_embeddings", "max_batch_size",
    "dropout",
}
_READ_OF_EXPERTS = {"num_experts", "num_experts_per_tok"}
# What Mistral AI's params say of a model that is computed here; any other key must be off.
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": (None, "transformer"), "activation": (None, "silu"), "causal": (None, True)}
_OFF: tuple[object, ...] = (None, False, "", [], {})


def config_from_meta(
    values: dict[str, object], source: str, *, ffn_dim: int, vocab_size: int, tied: bool, value_head: bool,
    embedding_split_dim: int, dtype: str,
) -> ModelConfig:
    """Read a params.json or a file's model_args; the weights settle what the file leaves open, ffn_dim to dtype.

    The FFN width and vocabulary are the tensors', because `multiple_of`, `ffn_dim_multiplier` and a
    vocab_size of -1 only describe them indirectly; values that disagree are an error.
    """

    def number(key: str, default: float, kind: type = int, among: dict[str, object] = values) -> int | float:
        """A number above 0, or the default where none is given."""
        given = among.get(key)
        return default if given is None else kind(above_zero(given, key, kind, source))

    dim, n_layers, n_heads = (above_zero(values[key], key, int, source) for key in ("dim", "n_layers", "n_heads"))
    experts = values.get("moe") or {}
    if not isinstance(experts, dict):
        raise UserError(f"{source}: moe={experts!r}; expected an object with num_experts and num_experts_per_tok")
    _check_keys(values, _READ, source)
    _check_keys(experts, _READ_OF_EXPERTS, f"{source}: moe")
    if is_true(values, "tied_embeddings", source) and not tied:
        raise UserError(f"{source}: tied_embeddings=True, but output and tok_embeddings differ; set it to false to "
                        "keep both")
    stated = number("hidden_dim", 0)
    if "multiple_of" in values and not stated:
        stated = meta_ffn_dim(dim, number("multiple_of", 1), number("ffn_dim_multiplier", 0.0, float))
    if stated not in (0, ffn_dim):
        raise UserError(f"{source} means an FFN width of {stated}, but w1 has {ffn_dim} rows")
    if values.get("vocab_size", -1) not in (-1, vocab_size):
        raise UserError(f"{source}: vocab_size={values['vocab_size']!r}, but tok_embeddings has {vocab_size} rows")
    own_head_dim = "hidden_dim" in values and "head_dim" in values
    family = "mixtral" if experts else "mistral" if own_head_dim else PLAIN
    window = number("sliding_window", 0)
    scaled: dict[str, object] = {}
    if is_true(values, "use_scaled_rope", source):
        small = tied or (dim, n_layers) in ((2048, 16), (3072, 28))  # of Llama 3.2, also where its output is untied
        factor = 32.0 if small else 8.0  # of Llama 3.1
        scaled = {"rope_type": "wavelength", "rope_factor": number("rope_scaling_factor", factor, float),
                  "rope_high_freq_factor": number("rope_high_freq_factor", 4.0, float)}
    return ModelConfig(
        family=family,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=number("n_kv_heads", n_heads),
        head_dim=number("head_dim", dim // n_heads),
        max_seq_len=number("max_seq_len", number("max_position_embeddings", 2048)),
        norm_eps=number("norm_eps", 1e-5, float),
        rope_theta=number("rope_theta", 10000.0, float),
        windows=(window,) * n_layers if window else (),
        n_experts=number("num_experts", 0, among=experts),
        n_active_experts=number("num_experts_per_tok", 0, among=experts),
        **scaled,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        tied=tied,
        value_head=value_head,
        embedding_split_dim=0 if tied else embedding_split_dim,
        dtype=dtype)


def _check_keys(values: dict[str, object], read: set[str], source: str) -> None:
    """Raise UserError for a key that may change what the model computes, such as yarn, and is not read."""
    for key, value in values.items():
        if key not in read and value not in _PLAIN_VALUES.get(key, _OFF):
            raise UserError(f"{source}: {key}={str(value)[:100]} is not implemented; remove it if it changes nothing "
                            "of the model")


def meta_ffn_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    """FFN width as Meta's model.py derives it from params.json."""
    hidden = int(8 * dim / 3)
    if ffn_dim_multiplier:
        hidden = int(float(ffn_dim_multiplier) * hidden)
    return multiple_of * -(-hidden // multiple_of)
