"""What a decoder is made of: one frozen record of facts, as params.json holds it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from src.errors import UserError
from src.parallel import share

CHOICES: dict[str, tuple[str | int, ...]] = {
    "activation": ("silu", "gelu_tanh"),
    "rope_type": ("default", "linear", "wavelength", "dynamic", "yarn", "longrope"),
    "embedding_split_dim": (0, 1),
    "objective": ("pairwise", "outcome", "process"),
    "score": ("last", "mean", "steps"),
    "step": ("paragraph", "line"),
    "verifier_form": ("", "qwen-prm", "math-shepherd", "rlhflow"),
    "dtype": ("float32", "bfloat16", "float16"),
}
LARGEST = 2**53  # beyond it json's numbers are not exact
_MAY_BE_NEGATIVE = {"score_mean"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every fact needed to build a model. Names follow Meta's params.json where it has one.

    max_seq_len is the longest context the model was made for. tok_embeddings are cut along embedding_split_dim:
    0 by vocabulary rows, 1 by width (Meta's first releases). The last n_added_tokens rows of the vocabulary
    are not of the released model.

    rope_type says how rotary frequencies are stretched: `linear` divides all by rope_factor, `wavelength` and `yarn`
    only those that turn less than rope_low_freq_factor to rope_high_freq_factor times within
    rope_original_max_seq_len, `longrope` each by its own of rope_short_factors, `dynamic` none as long as no position
    exceeds max_seq_len - beyond it, nor beyond it with longrope (whose rope_long_factors would depend on what else is
    in a row) or logn_attention, the model's rule is not implemented and the decoder refuses. rope_attention_factor
    multiplies rotated queries and keys; 0 stands for what yarn or longrope make of rope_factor.
    Rotary positions are of the first partial_rotary_factor of a head, and of no head in nope_layers. Layers with a
    window turn with window_rope_theta, unstretched; 0: as the others.

    windows holds each layer's sliding window in positions, its own included; 0, or an empty tuple, is unlimited.
    Attention scores are multiplied by attention_multiplier; 0 stands for query_pre_attn_scalar ** -0.5, where 0 stands
    for head_dim. A softcap of c turns scores x into c tanh(x / c); 0 leaves them. qkv_bias: of wq, wk and wv;
    attention_bias: of wo too. qk_norm: queries and keys are normalised, head by head or, with qk_norm_whole, over all
    heads at once. norm_offset: norms store their weight minus one. pre_norms, post_norms: what attention and
    feed-forward read, and what they give, is normalised. scaled_embeddings: embeddings are multiplied by the root of
    dim. What layers add to the residual stream is multiplied by residual_multiplier; logits are divided by
    logit_divisor.

    With n_experts > 0 a router sends each token to n_active_experts feed-forward layers of width ffn_dim, and all to
    a shared one of width shared_ffn_dim, if that is not 0; renormalised_experts: the chosen ones' probabilities are
    made to sum to one.

    A value head (`v_head`, one score a position) replaces the output layer; two_layer_head: with a layer of the model's
    width and a ReLU before it, and biases. verifier_form: whose process verifier it is, if not one trained here, which
    says how it is shown steps (data.encoding). objective says what a verifier was
    trained for: pairwise (scores order two solutions), outcome or process (scores are logits of a solution or a step
    being right); score says where the score of a response is read: at its `last` token, as the `mean` over its tokens,
    or at the end of its `steps`; score_mean and score_std are the measured statistics of such scores; step says what
    a step was to an outcome or process verifier in training. chat_template names the format that training put texts in
    (none for none); empty where no training here has chosen one. template_args are the values of its own variables,
    system_prompt is the system message of conversations that had none.

    carried holds what else a Hugging Face config.json said (ids of special tokens, dropout, ...): nothing is computed
    from it here, and an export says it again.
    """

    family: str = "llama"  # whose facts are the defaults; nothing is computed from it
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    n_added_tokens: int = 0
    max_seq_len: int
    norm_eps: float = 1e-5
    norm_offset: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    rope_attention_factor: float = 0.0
    rope_short_factors: tuple[float, ...] = ()
    rope_long_factors: tuple[float, ...] = ()
    window_rope_theta: float = 0.0
    nope_layers: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    logn_attention: bool = False
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_multiplier: float = 0.0
    query_pre_attn_scalar: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    windows: tuple[int, ...] = ()
    n_experts: int = 0
    n_active_experts: int = 0
    shared_ffn_dim: int = 0
    renormalised_experts: bool = True
    residual_multiplier: float = 1.0
    embedding_multiplier: float = 1.0
    logit_divisor: float = 1.0
    tied: bool = False
    scaled_embeddings: bool = False
    embedding_split_dim: int = 1
    value_head: bool = False
    two_layer_head: bool = False
    verifier_form: str = ""
    objective: str = "pairwise"
    score: str = "last"
    score_mean: float = 0.0
    score_std: float = 1.0
    step: str = "paragraph"
    dtype: str = "float32"
    chat_template: str = ""
    template_args: dict[str, object] = field(default_factory=dict, hash=False)
    system_prompt: str = ""
    carried: dict[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            # type(), not isinstance(): to Python true is an integer
            if kind is int and (type(value) is not int or not 0 <= value < LARGEST):
                raise UserError(f"{name}={value!r}: expected a non-negative integer")
            if kind is float and not (is_number(value) and (value >= 0 or name in _MAY_BE_NEGATIVE)):
                raise UserError(f"{name}={value!r}: expected a number, not below 0")
            if kind is bool and type(value) is not bool:
                raise UserError(f"{name}={value!r}: expected true or false")
            if kind is str and type(value) is not str:
                raise UserError(f"{name}={value!r}: expected a text")
        if not isinstance(self.template_args, dict):
            raise UserError(f"template_args={self.template_args!r}: expected an object")
        if self.n_kv_heads == 0 or self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
                raise UserError(f"{name}={getattr(self, name)!r}: expected {expected}")
        whole = {type(number) is int and number >= 0 for number in (*self.windows, *self.nope_layers)} <= {True}
        if not whole or len(self.windows) not in (0, self.n_layers):
            raise UserError(f"windows={list(self.windows)}, nope_layers={list(self.nope_layers)}: expected "
                            f"non-negative integers, of windows one for each of {self.n_layers} layers")
        for name in ("rope_short_factors", "rope_long_factors"):
            factors, pairs = getattr(self, name), self.rotary_dim // 2 if self.rope_type == "longrope" else 0
            if len(factors) != pairs or not all(is_number(factor) and factor > 0 for factor in factors):
                raise UserError(f"{name}={list(factors)}: expected {pairs} numbers above 0 ({self.rope_type} rope)")
        if self.n_experts and not 0 < self.n_active_experts <= self.n_experts:
            raise UserError(f"n_active_experts={self.n_active_experts}: expected 1 to n_experts={self.n_experts}")
        if self.n_experts and self.mlp_bias:
            raise UserError(f"mlp_bias=True is not implemented with n_experts={self.n_experts}; expected false")
        for name in ("rope_factor", "rope_theta", "head_dim", "max_seq_len", "score_std", "logit_divisor"):
            if getattr(self, name) == 0:
                raise UserError(f"{name}={getattr(self, name)}: expected a number above 0")
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise UserError(f"rope_low_freq_factor={self.rope_low_freq_factor}: expected a number below "
                            f"rope_high_freq_factor={self.rope_high_freq_factor}")
        if self.head_dim % 2 or self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(f"head_dim={self.head_dim}, of which {self.rotary_dim} rotate; rotary positions need pairs")
        if self.tied and self.embedding_split_dim != 0:
            raise UserError("tied embeddings are shared with the output layer: embedding_split_dim must be 0")

    def heads_on(self, n: int, index: int) -> tuple[range, range]:
        """The query heads and the key-value heads that tensor-parallel part `index` of n holds.

        KV heads are shared out as evenly as they can be, and query heads follow theirs. With fewer KV heads
        than parts, several parts hold a copy of the same KV head and share out its query heads.
        """
        group = self.n_heads // self.n_kv_heads
        if self.n_kv_heads >= n:
            # a key-value head and the queries that read it stay on one part
            kv = share(self.n_kv_heads, n, index)
            return range(kv.start * group, kv.stop * group), kv
        head = index * self.n_kv_heads // n
        copies = [part for part in range(n) if part * self.n_kv_heads // n == head]
        queries = share(group, len(copies), copies.index(index))
        return range(head * group + queries.start, head * group + queries.stop), range(head, head + 1)

    @property
    def idle_weights(self) -> int:
        """How many weights of experts a token does not pass, in all layers together."""
        return (self.n_experts - self.n_active_experts) * 3 * self.dim * self.ffn_dim * self.n_layers

    def rows_of(self, heads: range) -> range:
        """The rows of a projection that belong to these heads."""
        return range(heads.start * self.head_dim, heads.stop * self.head_dim)

    def check_divides(self, n: int, where: str) -> None:
        """Raise UserError, naming the field, unless the model can be cut into n tensor-parallel shards."""
        if n < 1:
            raise UserError(f"{where}: cannot be cut into {n} shards; choose 1 or more")
        idle = [index for index in range(n) if not len(self.heads_on(n, index)[0])]
        if idle:
            raise UserError(f"{where}: n_heads={self.n_heads} leaves nothing to do for shard {idle[0]} of {n}; choose "
                            f"at most {self.n_heads} shards")
        if self.ffn_dim < n:
            raise UserError(f"{where}: ffn_dim={self.ffn_dim} cannot be shared out over {n} shards; choose fewer")

    def check_heads(self, n: int, parts: int, where: str) -> None:
        """Raise UserError, naming the model, unless `parts` ranks can share the query heads of each of n
        tensor-parallel ones."""
        for held in (len(self.heads_on(n, index)[0]) for index in range(n)):
            if held % parts:
                raise UserError(f"{where}: --context_parallel_size {parts} does not divide the {held} query heads of a "
                                f"tensor-parallel rank (n_heads={self.n_heads} over {n}); choose what does")

    def embedding_dim_on(self, n: int) -> int:
        """The dimension along which n shards cut tok_embeddings: the width only where it divides."""
        # slices of a width must be equal, for the ranks' are gathered; rows of a vocabulary are padded
        return 0 if self.dim % n else self.embedding_split_dim

    def window_of(self, layer: int) -> int:
        """The sliding window of a layer in positions; 0 = unlimited."""
        return self.windows[layer] if self.windows else 0

    @property
    def rotary_dim(self) -> int:
        """The dimensions of a head, from its first on, that rotary positions turn."""
        return int(self.head_dim * self.partial_rotary_factor)

    def to_dict(self) -> dict[str, object]:
        """The contents of params.json."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """One hash for what a model computes with besides its weights; fields at their defaults play no part, so that
        another version with more of them gives the same."""
        known = {name: value for name, value in self.to_dict().items()
                 if name not in RECORDED and value != FIELDS[name].default}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


# what is said of a checkpoint, and read where texts are made
RECORDED = ("carried", "chat_template", "template_args", "system_prompt", "dtype")
FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}
TYPES = {name: field.type for name, field in FIELDS.items()}


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold; true, false and NaN are none."""
    return type(value) in (int, float) and -1e308 < value < 1e308
