"""src/load.py: any number of ranks opens any number of shards, and computes the same."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.loading import write_model
from src import load, parallel
from src.checkpoint import saving, storage
from src.checkpoint.sources import merge, open_adapter, open_source
from src.checkpoint.split import split
from src.errors import UserError
from src.models.decoder import Decoder
from src.models.lora import LoraConfig
from tests.checkpoint.weights import CONFIG, random_weights
from tests.conftest import Folders
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 query heads and 4 KV heads: with 8 shards a KV head lies in two of them."""
    from tests import reference  # transformers costs seconds, and ranks need none of it

    return reference.make_llama(tmp_path_factory.mktemp("hf"), "gqa")


def cut(source: Path, folder: Path, n: int) -> str:
    split(open_source(str(source)), folder, n, str(source))
    return str(folder)


def parameters(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("n", [2, 3, 8])
def test_one_process_opens_any_number_of_shards(tmp_path: Path, hf_folder: Path, n: int) -> None:
    parallel.start()
    expected = parameters(load.load_solver(cut(hf_folder, tmp_path / "1", 1)))
    found = parameters(load.load_solver(cut(hf_folder, tmp_path / "n", n)))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_first_layers_of_a_model_keep_their_windows(tmp_path: Path, hf_folder: Path) -> None:
    source = open_source(str(hf_folder))
    windows = (4, *[0] * (source.config.n_layers - 1))
    split(source._replace(config=dataclasses.replace(source.config, windows=windows)), tmp_path / "1", 1, "windowed")
    parallel.start()
    config = load.load_solver(str(tmp_path / "1"), n_layers=1).config
    assert (config.n_layers, config.windows) == (1, (4,))


@pytest.mark.parametrize("file", ["consolidated.00.pth", "consolidated.01.pth"])
def test_flipped_bit_is_found_by_whoever_loads(tmp_path: Path, hf_folder: Path, file: str) -> None:
    folder = Path(cut(hf_folder, tmp_path / "2", 2))
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    parallel.start()
    with pytest.raises(UserError, match=f"{file} has the right size but other contents"):
        load.load_solver(str(folder))


@pytest.mark.parametrize("n", [12, 101])
def test_shards_behind_the_tenth_and_the_hundredth_keep_their_place(tmp_path: Path, n: int) -> None:
    config = dataclasses.replace(CONFIG, **{"n_heads": 104, "n_kv_heads": 2, "ffn_dim": 104})
    weights = random_weights(config)
    with storage.writing(tmp_path):
        storage.write_shard(tmp_path, storage.WEIGHTS, 0, weights)
        storage.finish(tmp_path, 1, {"params.json": config.to_dict()}, [], {})
    parallel.start()
    found = parameters(load.load_solver(cut(tmp_path, tmp_path / "n", n)))
    assert len(storage.shard_paths(tmp_path / "n")) == n
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_the_same_from_any_number_of_shards(
    tmp_path: Path, hf_folder: Path, ranks: int
) -> None:
    folders = {str(n): cut(hf_folder, tmp_path / str(n), n) for n in (1, 2, 3, 8)}
    tokens = [[1, 17, 5, 33, 8, 60, 2], [1, 40, 41, 9, 9, 12, 7]]
    for result in run_ranks(
        ranks, "tests.test_load:shard_sums", tmp_path, folders=folders, tokens=tokens
    ):
        own = result[str(ranks)]
        for found in result.values():
            assert all(torch.equal(found[name], own[name]) for name in own)


def shard_sums(folders: dict[str, str], tokens: list[list[int]]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and logits on this rank, by the directory that was opened."""
    results = {}
    for name, folder in folders.items():
        model = load.load_solver(folder)
        with torch.no_grad():
            logits = parallel.gather_vocab(model.logits(model(torch.tensor(tokens))))
        results[name] = parameters(model) | {"logits": logits}
    return results


def test_adapters_and_value_heads_open_on_another_number_of_ranks(tmp_path: Path, hf_folder: Path) -> None:
    base = cut(hf_folder, tmp_path / "base", 3)
    run_ranks(
        2, "tests.test_load:save_verifier_adapter", tmp_path, base=base, folder=str(tmp_path / "lora")
    )
    assert len(storage.shard_paths(tmp_path / "lora", storage.ADAPTER)) == 2
    parallel.start()
    found = parameters(load.load_verifier(str(tmp_path / "lora")))
    expected = {name: stored.load() for name, stored in open_source(str(tmp_path / "lora")).tensors.items()}
    assert found["v_head.weight"].any()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = open_source(base).tensors["layers.0.attention.wq.weight"].load()
    assert not torch.equal(found["layers.0.attention.wq.weight"], plain)


def save_verifier_adapter(base: str, folder: str) -> dict[str, object]:
    """A verifier's adapter with random factors and value head, alike whatever the number of ranks."""
    verifier = load.load_verifier(base, from_solver=True)
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "wk", "wo", "w2"))
    load.put_lora_on(verifier, lora, seed=1)
    for name, parameter in verifier.named_parameters():
        if parameter.requires_grad and "lora_b" in name or name == "v_head.weight":
            torch.nn.init.constant_(parameter, 0.1)
    saving.begin_save(verifier, folder, base, lora=lora).complete()
    return {}


@pytest.mark.parametrize(("size", "is_told"), [(1e-4, True), (1e-2, False)])
def test_an_adapter_that_rounding_swallows_is_told(
    tmp_path: Path, hf_folder: Path, caplog: pytest.LogCaptureFixture, size: float, is_told: bool
) -> None:
    base, folder = str(tmp_path / "base"), str(tmp_path / "lora")
    split(open_source(str(hf_folder)), Path(base), 1, "hf", "bfloat16")
    model = load.load_solver(base)
    lora = LoraConfig(rank=2, alpha=4.0, dropout=0.0, targets=("wq", "w2"))
    load.put_lora_on(model, lora, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=size)
    saving.begin_save(model, folder, base, lora=lora).complete()
    before, exact, rounded = (
        dict(load.load_solver(each, precision=precision).named_parameters())
        for each, precision in ((base, "float32"), (folder, "float32"), (folder, "bfloat16")))
    updates = {name: (tensor - before[name]).flatten() for name, tensor in exact.items() if ".w" in name}
    asked = torch.cat(list(updates.values()))
    kept = torch.cat([(rounded[name].float() - before[name]).flatten() for name in updates]) @ asked / (asked @ asked)
    told = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert bool(told) == is_told == (kept.item() < 0.8)
    assert not told or f"bfloat16, to which merged weights are rounded, keeps {100 * kept:.0f}% of" in told[0]
    caplog.clear()
    merge(open_adapter(Path(folder)), "bfloat16", "advice")
    assert bool(caplog.records) == is_told


def test_a_rank_holds_what_it_keeps_of_a_model_and_little_more(tmp_path: Path) -> None:
    """30M parameters on two data-parallel ranks; what a rank does not write it does not gather."""
    write_model(tmp_path / "base", "dataset/toy/base", 512, 6, 4096)
    files = {"folder": str(tmp_path / "base"), "save_dir": str(tmp_path / "run")}
    ranks = run_ranks(2, "benchmarks.loading:phases", tmp_path, 1, **files)
    shard = 4 * sum(tensor.numel() for tensor in storage.read_shard(tmp_path / "base" / "consolidated.00.pth").values())
    for found in ranks:
        assert 0.49 * shard < found["load"][0] < 1.2 * shard / 2
        assert 0.98 * shard < found["resume"][0] < 1.2 * shard  # two moments
    assert ranks[1]["save"][0] < 0.05 * shard


def test_no_training_sequence_is_longer_than_the_context(folders: Folders) -> None:
    config = load.load_config(folders.one)  # of 128 positions
    long = dataclasses.replace(config, max_seq_len=4096)
    assert [load.context_limit(asked, "d", config) for asked in (-1, 1, 128)] == [128, 1, 128]
    assert [load.context_limit(asked, "d", long) for asked in (-1, 1024, 4096)] == [512, 1024, 4096]
    for asked, own in ((129, config), (4097, long)):
        with pytest.raises(UserError, match=f"--max_seq_len {asked} is more than the context of d, {asked - 1} tokens"):
            load.context_limit(asked, "d", own)
