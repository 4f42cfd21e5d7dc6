"""Every family against transformers: logits, gradients and cached decoding at tensor-parallel sizes 1, 2 and 4."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import solver_train
from src import load, parallel
from src.checkpoint import convert, storage
from src.checkpoint.shards import cut_of, join
from src.checkpoint.sources import open_source, read_config
from src.checkpoint.split import split
from src.checkpoint.tensor_files import StoredTensor
from src.errors import UserError
from src.jsonfile import write_json
from src.models.config import ModelConfig
from src.planning import plan
from src.planning.memory import local_parameters
from tests import reference, tiny, workers, zoo
from tests.ranks import run_ranks

NEWER = ["smollm3", "phi-3", "phi-4-mini", "olmo-2", "olmo-3", "granite", "gemma-3", "glm-4", "qwen-2-moe"]
# The models that run on n ranks, and those that decode there: one of each kind of arithmetic beyond one rank.
RUNS = {
    1: list(zoo.MODELS),
    2: list(zoo.MODELS),
    4: [
        "llama-1",
        "llama-2-70b",
        "one kv head",
        "uneven",
        "mixtral",
        "qwen-2",
        "qwen-3",
        "qwen-3-moe",
        "gemma-2",
        "biases",
        *NEWER,
    ],
}
DECODES = {
    1: [
        "mistral-window",
        "qwen",
        "qwen-2-window",
        "qwen-3-moe",
        "gemma-2",
        "llama-3.1",
        "deepseek-coder",
        "biases",
        *NEWER,
    ],
    2: ["one kv head", "uneven", "gemma-2", "biases", "olmo-3"],
}
WAYS = ["padded", "packed", "token by token", "among others", "after a prefix"]
runs = pytest.mark.parametrize(("n", "name"), [(n, name) for n in RUNS for name in RUNS[n]])
decodes = pytest.mark.parametrize(("n", "name"), [(n, name) for n in DECODES for name in DECODES[n]])


class Ranks(NamedTuple):
    """What n ranks computed for each model, and the models' configs."""

    results: list[dict[str, dict[str, object]]]
    configs: dict[str, ModelConfig]


On = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model as a Hugging Face directory."""
    root = tmp_path_factory.mktemp("hf")
    return {name: zoo.make(root / name, name) for name in zoo.MODELS}


@pytest.fixture(scope="module")
def on(hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> On:
    """What n ranks say of every model that runs there: split for them, and run in one launch."""

    @functools.cache
    def on(n: int) -> Ranks:
        root = tmp_path_factory.mktemp("split")
        for name in RUNS[n]:
            split(open_source(str(hf_folders[name])), root / name, n, name)
        folders = {name: str(root / name) for name in RUNS[n]}
        tokens, mask, *_ = reference.batch()
        arguments = {
            "folders": folders,
            "tokens": tokens.tolist(),
            "mask": mask.tolist(),
            "cached": DECODES.get(n, []),
        }
        if n == 1:
            parallel.start()
            results = [workers.decoders(**arguments)]
        else:
            results = run_ranks(n, "tests.workers:decoders", root, **arguments)
        return Ranks(results, {name: read_config(root / name) for name in folders})

    return on


@runs
def test_logits_equal_transformers(on: On, hf_folders: dict[str, Path], n: int, name: str) -> None:
    with torch.no_grad():
        expected, _ = reference.hf_logits_and_loss(zoo.reference_model(hf_folders[name]))
    vocab = expected.shape[-1]
    for rank in on(n).results:
        assert rank[name]["logits"][..., vocab:].eq(float("-inf")).all()  # padding of the vocabulary
        assert reference.relative_difference(rank[name]["logits"][..., :vocab], expected) < 1e-4


@runs
def test_gradients_of_the_sft_loss_equal_transformers(
    on: On, hf_folders: dict[str, Path], n: int, name: str
) -> None:
    pieces = [rank[name]["gradients"] for rank in on(n).results]
    expected = _hf_gradients(hf_folders[name], on(n).configs[name])
    assert set(expected) == set(pieces[0])
    for parameter, gradient in expected.items():
        own = [piece[parameter] for piece in pieces]
        whole = join(own, cut_of(parameter, on(n).configs[name], len(own)))  # refuses copies that disagree
        assert reference.relative_difference(whole, gradient) < 1e-4, parameter


def _hf_gradients(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Gradients of transformers' model under our names and in our rotary layout."""
    model = zoo.reference_model(folder)
    reference.hf_logits_and_loss(model)[1].backward()
    family = model.config.model_type
    stored = {
        convert.from_hf_name(name, family): StoredTensor(tuple(p.shape), lambda p=p: p.grad, p.dtype)
        for name, p in model.named_parameters()
    }
    return {name: tensor.load() for name, tensor in convert.as_ours(stored, config).items()}


@runs
def test_an_optimizer_step_keeps_copies_equal_and_counts_them_once(on: On, n: int, name: str) -> None:
    stepped, config = [rank[name]["stepped"] for rank in on(n).results], on(n).configs[name]
    for parameter in stepped[0]["weights"]:
        own = [rank["weights"][parameter] for rank in stepped]
        join(own, cut_of(parameter, config, n))  # refuses copies that disagree
    alone = on(1).results[0][name]["stepped"]["grad_norm"]
    assert [rank["grad_norm"] for rank in stepped] == pytest.approx([alone] * n, rel=1e-4)


@decodes
def test_long_rows_equal_transformers(on: On, hf_folders: dict[str, Path], n: int, name: str) -> None:
    with torch.no_grad():
        expected = zoo.reference_model(hf_folders[name])(workers.LONG_ROW[None]).logits[0].log_softmax(-1)
    for rank in on(n).results:
        found = rank[name]["cached"]["plain"][:, : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@decodes
def test_cached_decoding_equals_plain(on: On, n: int, name: str, way: str) -> None:
    for rank in on(n).results:
        logprobs = rank[name]["cached"]
        torch.testing.assert_close(logprobs[way], logprobs["plain"], rtol=1e-6, atol=2e-5)


@decodes
def test_fresh_adapters_change_nothing(on: On, n: int, name: str) -> None:
    for rank in on(n).results:
        adapted = rank[name]["adapted"]
        assert reference.relative_difference(adapted["after"], adapted["before"]) < 1e-6


@pytest.fixture(scope="module")
def alone(hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A model of the zoo as a directory of one shard."""
    parallel.start()

    @functools.cache
    def alone(name: str) -> str:
        folder = tmp_path_factory.mktemp("alone") / name.replace(" ", "-")
        split(open_source(str(hf_folders[name])), folder, 1, name)
        return str(folder)

    return alone


@pytest.mark.parametrize("name", ["qwen", "internlm2", "phi-4-mini"])
def test_context_beyond_what_is_implemented_is_refused(alone: Callable[[str], str], name: str) -> None:
    model = load.load_solver(alone(name))
    assert model.config.max_seq_len == 128
    model(torch.ones(1, 128, dtype=torch.int64))
    with pytest.raises(UserError, match="position 128 lies beyond the model's context of 128"):
        model(torch.ones(1, 129, dtype=torch.int64))


@pytest.mark.parametrize("name", ["mixtral", "qwen-3-moe", "qwen-2-moe", "biases", "olmo-2"])
def test_every_kind_can_be_quantised(alone: Callable[[str], str], name: str) -> None:
    tokens = reference.batch()[0]
    full, small = (
        workers.all_logits(load.load_solver(alone(name), quantize=q), tokens) for q in ("", "int8")
    )
    assert 0 < reference.relative_difference(small, full) < 0.1


@pytest.mark.parametrize("name", NEWER)
def test_in_bfloat16_logits_are_as_near_to_float32_as_transformers(
    alone: Callable[[str], str], hf_folders: dict[str, Path], name: str
) -> None:
    tokens, models = reference.batch()[0], [zoo.reference_model(hf_folders[name]) for _ in range(2)]
    models[1].bfloat16().set_experts_implementation("eager")  # grouped products want wider experts
    with torch.no_grad():
        exact, theirs = (model(tokens).logits.float() for model in models)
    ours = workers.all_logits(load.load_solver(alone(name), precision="bfloat16"), tokens).float()
    ours = ours[..., : exact.shape[-1]]
    rounded = (theirs - exact).norm()
    assert rounded > 1e-3 * exact.norm()
    assert (ours - exact).norm() < 1.1 * rounded and (ours - theirs).norm() < 2 * rounded


@pytest.mark.parametrize("name", NEWER)
def test_a_dry_run_plans_the_parameters_that_there_are(
    hf_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    parallel.start()
    (hf_folders[name] / "generation_config.json").unlink()  # its ends are not this tokenizer's
    tiny.write_tokenizer(hf_folders[name])
    for n in (1, 2, 4):
        split(open_source(str(hf_folders[name])), tmp_path / str(n), n, name)
        for path in storage.shard_paths(tmp_path / str(n)):
            held = sum(tensor.numel() for tensor in storage.read_shard(path).values())
            assert held == local_parameters(read_config(tmp_path / str(n)), n)
    write_json(tmp_path / "rows.json", [{"instruction": "1+1=", "output": "2"}])
    solver_train.main(solver_train.SolverTrainConfig(
        ckpt_dir=str(tmp_path / "1"), save_dir=str(tmp_path / "out"), train_file=str(tmp_path / "rows.json"),
        dry_run=True))
    said = capsys.readouterr().out
    n_parameters = sum(parameter.numel() for parameter in load.load_solver(str(tmp_path / "1")).parameters())
    assert re.search(rf"^  weights +{re.escape(plan.size(4 * n_parameters))}$", said, re.MULTILINE), said
