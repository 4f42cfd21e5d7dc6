"""src/models/families.py: the facts of released models, and claims that contradict a checkpoint."""

import pytest

from src.errors import UserError
from src.models.families import MODEL_TYPES, check_model_type, meta_ffn_dim
from tests.checkpoint.weights import CONFIG


@pytest.mark.parametrize(
    ("model_type", "multiple_of", "multiplier"),
    [
        ("llama-1-7b", 256, None),
        ("llama-1-13b", 256, None),
        ("llama-1-30b", 256, None),
        ("llama-1-65b", 256, None),
        ("llama-2-70b", 4096, 1.3),
        ("llama-3-8b", 1024, 1.3),
        ("llama-3-70b", 4096, 1.3),
    ],
)
def test_ffn_width_of_released_models(model_type: str, multiple_of: int, multiplier: float | None) -> None:
    facts = MODEL_TYPES[model_type]
    assert meta_ffn_dim(facts["dim"], multiple_of, multiplier) == facts["ffn_dim"]


def test_model_type_must_not_contradict_the_checkpoint() -> None:
    check_model_type(CONFIG, "", "ckpt")
    check_model_type(CONFIG, "llama", "ckpt")
    with pytest.raises(UserError, match="ckpt has dim=32, but --model_type llama-2-7b means dim=4096"):
        check_model_type(CONFIG, "llama-2-7b", "ckpt")
    with pytest.raises(UserError, match="--model_type gpt is unknown; expected one of llama, "):
        check_model_type(CONFIG, "gpt", "ckpt")
