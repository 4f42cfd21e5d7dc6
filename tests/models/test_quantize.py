"""src/models/quantize.py: how close, how small, and the same on several ranks."""

from pathlib import Path

import pytest
import torch

from src import load, parallel
from src.checkpoint.shards import cut_of, join
from src.checkpoint.sources import open_source
from src.checkpoint.split import split, with_tokenizer
from src.models.config import ModelConfig
from src.models.linear import linear
from src.models.quantize import PRECISIONS, Precision, QuantizedMatrix, packed
from src.planning.memory import bytes_per_weight
from src.text.tokenizer import Tokenizer
from tests import reference, tiny
from tests.conftest import Folders
from tests.ranks import run_ranks
from tests.workers import (
    ADAPTERS,
    all_logits,
    fill_lora_b,
    gradients,
    quantised_logits,
    quantised_lora,
    weight_bytes,
)

TEXTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high. Lily's mom said, \"Lily, let's go home.\"",
    "Tom had a small dog. The dog liked to run and jump. They went to the park every day and played with a ball.",
    'One day, a bird sat in a tall tree. It was sad because it had no friends. A cat came and said, "Do not be sad. I '
    'will be your friend." The bird was happy and they sang together.',
    'Ben and Mia wanted to make a cake for their mom. They took milk, eggs and sugar. Mia said, "We must be careful."',
    "It was raining and the boy could not go out. He looked at the window and saw the sun. He smiled and ran to his "
    "dad. They went to the lake and saw many fish in the water.",
]
# share of float32's memory, worst top-1 agreement with float32
BARS = {"int8": (0.30, 0.97), "int4": (0.18, 0.85)}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A real trained model split for 1 and 2 ranks, and the texts as its ids."""
    folder, root = reference.shared("weights/stories260K"), tmp_path_factory.mktemp("stories")
    tokenizer_file = str(folder / "tok512.model")
    source = with_tokenizer(open_source(str(folder / "stories260K.pt")), tokenizer_file)
    for n in (1, 2):
        split(source, root / str(n), n, "stories260K")
    tokenizer = Tokenizer(Path(tokenizer_file))
    return root, [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trained_model_keeps_its_predictions_in_less_memory(
    stories: tuple[Path, list[list[int]]], precision: str
) -> None:
    parallel.start()
    root, texts = stories
    folder = str(root / "1")
    model = load.load_solver(folder)
    logits, share = quantised_logits(folder, texts, [precision])[precision]
    agreed = total = 0
    for text, found in zip(texts, logits, strict=True):
        expected = all_logits(model, torch.tensor([text]))[0]
        agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
        total += len(text)
    largest_share, least_agreement = BARS[precision]
    assert agreed / total >= least_agreement
    assert share <= largest_share


def test_ranks_quantise_as_one_does(stories: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    parallel.start()
    root, texts = stories
    precisions = list(PRECISIONS)
    alone = quantised_logits(str(root / "1"), texts, precisions)
    for rank in run_ranks(2, "tests.workers:quantised_logits", tmp_path, folder=str(root / "2"), texts=texts,
                          precisions=precisions):
        for precision, (logits, share) in rank.items():
            for found, expected in zip(logits, alone[precision][0], strict=True):
                # groups of w2's 172 columns end elsewhere on two ranks, so rounding differs a little
                assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
            assert share <= BARS[precision][0] + 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 7, 32, 50])
def test_error_is_at_most_half_a_step_and_rows_are_looked_up(bits: int, columns: int) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) + 0.3
    matrix = QuantizedMatrix(weight, Precision(bits, 16), torch.float32)
    dense = matrix.dense()
    assert dense.shape == weight.shape
    for group, found in zip(weight.split(16, 1), dense.split(16, 1), strict=True):
        span = group.amax(1, keepdim=True) - group.amin(1, keepdim=True)
        # scale and low are bfloat16: the ends of a group may lie 2^-9 of its size outside what codes reach
        slack = 2**-8 * (span + group.abs().amax(1, keepdim=True))
        assert ((found - group).abs() <= 0.51 * span / (2**bits - 1) + slack).all()
    indices = torch.tensor([[5, 0], [2, 2]])
    assert torch.equal(matrix.rows(indices), dense[indices])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [1, 3, 64])
def test_the_kernel_for_codes_multiplies_as_the_dense_matrix_does(precision: str, n: int) -> None:
    """Within bfloat16's rounding; a row's numbers do not depend on how many others there are."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 300, generator=generator) + 0.1, torch.randn(48, generator=generator)
    x = torch.randn(n, 1, 300, generator=generator).bfloat16()
    matrix = QuantizedMatrix(weight, PRECISIONS[precision], torch.bfloat16)
    exact = QuantizedMatrix(weight, PRECISIONS[precision], torch.float32).dense()
    expected = torch.nn.functional.linear(x.float(), exact, bias.bfloat16().float())
    dense = matrix.product(x, bias.bfloat16())
    matrix.pack()
    found = matrix.product(x, bias.bfloat16())
    assert len(matrix.parts) == {"int8": 2, "int4": 1}[precision] and found.shape == (n, 1, 48)
    # int8 is two products and their sum, each rounded: three independent errors where the dense product has one
    limit = {"int8": 3**0.5, "int4": 1.6}[precision]
    assert (found - expected).norm() <= limit * (dense - expected).norm()
    assert torch.equal(matrix.product(x[-1:], bias.bfloat16()), found[-1:])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_product_by_slices_of_rows_is_that_of_the_whole_matrix(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = QuantizedMatrix(torch.randn(600, 72, generator=generator), PRECISIONS[precision], torch.float32)
    x, bias = torch.randn(5, 72, generator=generator, requires_grad=True), torch.randn(600, generator=generator)
    whole = matrix.dense()
    matrix.product(x, bias).square().sum().backward()
    expected, = torch.autograd.grad(linear(x, whole, bias).square().sum(), x)
    assert torch.equal(x.grad, expected)
    with torch.inference_mode():
        assert torch.equal(matrix.dense(), whole)
        torch.testing.assert_close(matrix.product(x, bias), linear(x, whole, bias))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_is_packed_while_it_decodes(stories: tuple[Path, list[list[int]]], precision: str) -> None:
    parallel.start()
    root, texts = stories
    model = load.load_solver(str(root / "1"), quantize=precision, precision="bfloat16")
    matrices = [module for module in model.modules() if isinstance(module, QuantizedMatrix)]
    dense = all_logits(model, torch.tensor([texts[0]]))
    with packed(model):
        assert any(matrix.parts for matrix in matrices) or "AVX512" not in torch.backends.cpu.get_cpu_capability()
        found = all_logits(model, torch.tensor([texts[0]]))
    assert not any(matrix.parts for matrix in matrices)
    assert (found.argmax(-1) == dense.argmax(-1)).float().mean() > 0.95


def test_plan_counts_what_a_wide_model_takes() -> None:
    weight = torch.randn(64, 256)
    for name, precision in PRECISIONS.items():
        matrix = QuantizedMatrix(weight, precision, torch.float32)
        assert weight_bytes(matrix) == bytes_per_weight(name) * weight.numel()


def test_quantised_verifier_and_tied_solver_are_close(tmp_path: Path) -> None:
    parallel.start()
    tokens = torch.arange(3, 43).view(2, 20)
    source = reference.make_llama(tmp_path / "hf", "tied")
    split(open_source(str(source)), tmp_path / "tied", 1, "tied")
    tied = [
        all_logits(load.load_solver(str(tmp_path / "tied"), quantize=way), tokens) for way in ("", "int8")
    ]
    assert reference.relative_difference(tied[1], tied[0]) < 0.05
    folder = tiny.split(tiny.write_hf_llama(tmp_path / "gqa"), tmp_path / "ckpt")
    verifier = tiny.make_verifier(folder, tmp_path / "verifier")
    with torch.no_grad():
        models = [load.load_verifier(verifier, quantize=way) for way in ("", "int8")]
        scores = [model.scores(model(tokens)) for model in models]
    assert reference.relative_difference(scores[1], scores[0]) < 0.05


@pytest.mark.parametrize("n", [1, 2])
def test_adapters_on_a_frozen_base_in_few_bits(folders: Folders, tmp_path: Path, n: int) -> None:
    """Their gradients are those on a float32 base of the same weights; nothing dense is kept; they load on the base."""
    parallel.start()
    rows = reference.batch()
    arguments = {
        "folder": (folders.one, folders.two)[n - 1],
        "save_dir": str(tmp_path),
        "tokens": rows.tokens.tolist(),
        "mask": rows.response_mask.tolist(),
        "precisions": ["bfloat16", *PRECISIONS],
    }
    ranks = (
        [quantised_lora(**arguments)]
        if n == 1
        else run_ranks(n, "tests.workers:quantised_lora", tmp_path, **arguments)
    )
    model = load.load_solver(folders.one)
    config, whole = model.config, weight_bytes(model)
    for precision in arguments["precisions"]:
        found = [rank[precision] for rank in ranks]
        model = load.load_solver(folders.one)
        dense = joined([rank["dense"] for rank in found], config)
        for name, tensor in dense.items():
            original = model.get_parameter(name).data
            assert not torch.equal(original, tensor)
            original.copy_(tensor)
        load.put_lora_on(model, ADAPTERS, seed=5)
        fill_lora_b(model)
        expected = gradients(model, rows)
        for name, gradient in joined([rank["gradients"] for rank in found], config).items():
            assert reference.relative_difference(gradient, expected[name]) < 1e-5, name
        for rank in found:
            shapes = [list(tensor.shape) for tensor in rank["dense"].values()]
            assert not [shape for shape in rank["kept"] if shape in shapes or shape[::-1] in shapes]
            assert reference.relative_difference(rank["loaded"], rank["adapted"]) < 1e-5
            assert rank["bytes"] < 0.75 * whole / n


def joined(ranks: list[dict[str, torch.Tensor]], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's part."""
    return {name: join([rank[name] for rank in ranks], cut_of(name, config, len(ranks))) for name in ranks[0]}
