"""What a decoder is made of: one frozen record of facts, read from and written to params.json."""

import dataclasses
from dataclasses import dataclass

from src.errors import UserError
from src.parallel import share


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every fact needed to build a model. Names follow Meta's params.json where it has one.

    max_seq_len is the longest context the model was made for. embedding_split_dim says how shards cut
    tok_embeddings: 0 by vocabulary rows, 1 by width (Meta's Llama 1 and 2). A value head (`v_head`, one score a
    position) replaces the output layer; score says where a verifier's score of a
    response is read: at its `last` token, or as the `mean` over its tokens; score_mean and score_std are the
    measured statistics of such scores. chat_template names the format that training put texts in
    (none for none); empty where no training here has chosen one.
    """

    family: str = "llama"
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False
    embedding_split_dim: int = 1
    value_head: bool = False
    score: str = "last"
    score_mean: float = 0.0
    score_std: float = 1.0
    dtype: str = "float32"
    chat_template: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 0):
                raise UserError(f"{field.name}={value!r}: expected a non-negative integer")
            if field.type is float and type(value) not in (int, float):
                raise UserError(f"{field.name}={value!r}: expected a number")
        if self.n_kv_heads == 0 or self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.score not in ("last", "mean"):
            raise UserError(f"score={self.score!r}: expected last or mean")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={self.dtype!r}: expected float32, bfloat16 or float16")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        if self.tied and self.embedding_split_dim != 0:
            raise UserError("tied embeddings are shared with the output layer: embedding_split_dim must be 0")

    def heads_on(self, n: int, index: int) -> tuple[range, range]:
        """The query heads and the key-value heads that tensor-parallel part `index` of n holds.

        KV heads are shared out as evenly as they can be, and query heads follow theirs. With fewer KV heads
        than parts, several parts hold a copy of the same KV head and share out its query heads.
        """
        group = self.n_heads // self.n_kv_heads
        if self.n_kv_heads >= n:
            kv = share(self.n_kv_heads, n, index)
            return range(kv.start * group, kv.stop * group), kv
        head = index * self.n_kv_heads // n
        copies = [part for part in range(n) if part * self.n_kv_heads // n == head]
        queries = share(group, len(copies), copies.index(index))
        return range(head * group + queries.start, head * group + queries.stop), range(head, head + 1)

    def rows_of(self, heads: range) -> range:
        """The rows of a projection that belong to these heads."""
        return range(heads.start * self.head_dim, heads.stop * self.head_dim)

    def check_divides(self, n: int, where: str) -> None:
        """Raise UserError, naming the field, unless the model can be cut into n tensor-parallel shards."""
        if n < 1:
            raise UserError(f"{where}: cannot be cut into {n} shards; choose 1 or more")
        idle = [index for index in range(n) if not len(self.heads_on(n, index)[0])]
        if idle:
            raise UserError(
                f"{where}: n_heads={self.n_heads} leaves nothing to do for shard {idle[0]} of {n}; "
                f"choose at most {self.n_heads} shards"
            )
        if self.ffn_dim < n:
            raise UserError(
                f"{where}: ffn_dim={self.ffn_dim} cannot be shared out over {n} shards; choose fewer"
            )

    def embedding_dim_on(self, n: int) -> int:
        """The dimension along which n shards cut tok_embeddings: the width only where it divides."""
        return 0 if self.dim % n else self.embedding_split_dim

    def to_dict(self) -> dict[str, object]:
        """The contents of params.json."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def config_from_dict(values: dict[str, object], source: str) -> ModelConfig:
    """Rebuild a config from params.json; `source` names the file. Raises UserError on a missing or unknown key."""
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise UserError(
            f"{source}: unknown key {unknown[0]!r}; a newer version of SplitRL may have written it"
        )
    missing = [
        name for name, field in FIELDS.items() if field.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise UserError(f"{source}: key {missing[0]!r} is missing")
    return ModelConfig(**values)
