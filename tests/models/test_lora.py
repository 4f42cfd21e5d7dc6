"""src/models/lora.py and adapter directories, at tensor-parallel sizes 1, 2 and 4; gradients against peft."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import load, parallel
from src.checkpoint import adapters, storage
from src.checkpoint.convert import from_hf_name, rotary_from_hf, rotary_to_hf
from src.checkpoint.shards import cut_of, join
from src.checkpoint.sources import AdapterSource, open_adapter, open_source, read_config
from src.checkpoint.split import split
from src.checkpoint.tensor_files import StoredTensor
from src.command.config import LoraFlags
from src.errors import UserError
from src.jsonfile import read_json, write_json
from src.models.config import ModelConfig
from src.models.layers import ColumnParallelLinear
from src.models.lora import LoraConfig, LoraLinear, at_length, check_targets, init_lora
from tests import reference
from tests.checkpoint.weights import CONFIG
from tests.conftest import Folders
from tests.ranks import Job, in_few_launches, succeed

SIZES = (1, 2, 4)


class Run(NamedTuple):
    """What the ranks of one size computed; the base and the adapter directory they used."""

    results: list[dict[str, object]]
    base: Path
    adapter: Path

    @property
    def config(self) -> ModelConfig:
        return read_config(self.base)

    def joined(self, key: str) -> dict[str, Tensor]:
        """The whole tensors under `key`; copies that every rank holds must be equal."""
        whole = {}
        for name in self.results[0][key]:
            pieces = [rank[key][name] for rank in self.results]
            whole[name] = join(pieces, cut_of(name, self.config, len(pieces)))
        return whole


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_llama(tmp_path_factory.mktemp("hf"), "gqa")


@pytest.fixture(scope="module")
def run(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """run(n, dora): the worker's results on n ranks, computed once."""
    tokens, mask = (x.tolist() for x in reference.batch()[:2])
    root, jobs = tmp_path_factory.mktemp("lora"), {}
    for n, dora in itertools.product(SIZES, (False, True)):
        base, adapter = root / f"{n}-{dora}" / "base", root / f"{n}-{dora}" / "adapter"
        split(open_source(str(hf_folder)), base, n, "gqa")
        arguments = {"folder": str(base), "save_dir": str(adapter), "tokens": tokens, "mask": mask, "dora": dora}
        jobs[n, dora] = Job(n, "tests.workers:lora", arguments)
    results = in_few_launches(jobs, root)

    def on(n: int, dora: bool = False) -> Run:
        arguments = jobs[n, dora].arguments
        return Run(results((n, dora)), Path(arguments["folder"]), Path(arguments["save_dir"]))

    return on


@pytest.mark.parametrize("n", SIZES)
def test_fresh_adapters_leave_the_output_as_it_was(run: Callable[[int], Run], n: int) -> None:
    for rank in run(n).results:
        assert torch.equal(rank["initial"], rank["base"])


@pytest.mark.parametrize("n", SIZES[1:])
def test_fresh_adapters_do_not_depend_on_the_tensor_parallel_size(run: Callable[[int], Run], n: int) -> None:
    one, many = run(1).joined("adapters"), run(n).joined("adapters")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert all(one[name].any() == name.endswith("lora_a.weight") for name in one)


@pytest.mark.parametrize("n", SIZES[1:])
def test_gradients_do_not_depend_on_the_tensor_parallel_size(run: Callable[[int], Run], n: int) -> None:
    one, many = run(1).joined("gradients"), run(n).joined("gradients")
    assert set(one) == set(many) == set(run(1).joined("adapters"))
    for name in one:
        assert reference.relative_difference(many[name], one[name]) < 1e-4, name


@pytest.mark.parametrize("n", SIZES)
def test_dora_at_any_tensor_parallel_size(run: Callable[[int], Run], n: int) -> None:
    one, many = run(1, True), run(n, True)
    for key, limit in (("adapters", 1e-6), ("gradients", 1e-4)):
        expected, found = one.joined(key), many.joined(key)
        assert set(expected) == set(found) and any(name.endswith("lora_m.weight") for name in found)
        for name in found:
            assert reference.relative_difference(found[name], expected[name]) < limit, name
    for rank in many.results:
        assert torch.equal(rank["initial"], rank["base"]) and rank["base_unchanged"]
        assert reference.relative_difference(rank["trained"], rank["base"]) > 0.01
        for way in ("loaded", "merged"):
            assert reference.relative_difference(rank[way], rank["trained"]) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_peft(run: Callable[[int], Run], hf_folder: Path, dora: bool) -> None:
    result, config = run(1, dora).results[0], run(1, dora).config
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=dora,
                               use_dora=dora)
    model = peft.get_peft_model(reference.hf_model(hf_folder), settings)
    found = {}
    for theirs, parameter in model.named_parameters():
        if "lora_" in theirs:
            stem, _, factor = theirs.removeprefix("base_model.model.").partition(".lora_")
            name = from_hf_name(f"{stem}.weight").removesuffix("weight")
            found[f"{name}lora_{factor[0].lower()}.weight"] = parameter
    assert set(found) == set(result["gradients"])
    values = result["filled"]
    for name, parameter in found.items():
        parameter.data = rotary_to_hf(_rotated(name), values[name], config)
    reference.hf_logits_and_loss(model)[1].backward()
    for name, parameter in found.items():
        expected = rotary_from_hf(_rotated(name), parameter.grad, config)
        assert reference.relative_difference(result["gradients"][name], expected) < 1e-4, name


def _rotated(name: str) -> str:
    """The weight whose rows a factor's rows are: B and DoRA's lengths have its base's rows, A has none of them."""
    return name.replace(".lora_b", "").replace(".lora_m", "")


@pytest.mark.parametrize("n", SIZES)
def test_w2s_20_merged_and_loaded_adapters_give_the_trained_logits(run: Callable[[int], Run], n: int) -> None:
    for rank in run(n).results:
        assert reference.relative_difference(rank["trained"], rank["base"]) > 0.01
        for way in ("loaded", "merged"):
            assert reference.relative_difference(rank[way], rank["trained"]) < 1e-5


def test_w2s_20_parameters_are_as_many_as_the_formula_says(folders: Folders) -> None:
    model, rank = load.load_solver(folders.one), 8
    names = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    load.put_lora_on(
        model, load.lora_config(LoraFlags(lora_rank=rank, lora_alpha=16.0, lora_targets=names)), seed=1
    )
    config = model.config
    heads, kv, ffn = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.ffn_dim
    widths = [heads, kv, kv, heads, ffn, ffn, ffn]  # each linear leads from or to the model's width
    expected = config.n_layers * sum(rank * (config.dim + width) for width in widths)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("n", SIZES)
def test_loading_an_adapter_in_bfloat16_equals_loading_the_merged_checkpoint(
    run: Callable[[int], Run], n: int
) -> None:
    for rank in run(n).results:
        loaded, merged = rank["loaded_bfloat16"], rank["merged_bfloat16"]
        assert all(torch.equal(loaded[name], merged[name]) for name in merged)


def test_split_command_merges_an_adapter_into_any_number_of_shards(
    run: Callable[[int], Run], tmp_path: Path
) -> None:
    trained = run(2)
    succeed("checkpoint_split.py", "--ckpt_file", trained.adapter, "--save_path", tmp_path, "--n", 4)
    base, own = open_source(str(trained.base)), trained.joined("trained_adapters")
    for name, stored in open_source(str(tmp_path)).tensors.items():
        expected, stem = base.tensors[name].load(), name.removesuffix(".weight")
        if f"{stem}.lora_a.weight" in own:
            product = own[f"{stem}.lora_b.weight"] @ own[f"{stem}.lora_a.weight"]
            expected = expected + 6.0 / 4 * product
        torch.testing.assert_close(stored.load(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_an_optimizer_step_leaves_the_base_bit_equal(run: Callable[[int], Run], n: int) -> None:
    assert all(rank["base_unchanged"] for rank in run(n).results)


@pytest.mark.parametrize("n", SIZES)
def test_adapter_directory_holds_only_adapter_tensors(run: Callable[[int], Run], n: int) -> None:
    folder = run(n).adapter
    assert not list(folder.glob("consolidated*"))
    paths = storage.shard_paths(folder, storage.ADAPTER)
    assert len(paths) == n
    for path in paths:
        assert all(".lora_a." in name or ".lora_b." in name for name in storage.read_shard(path))


@pytest.mark.parametrize("n", SIZES)
def test_dropout_acts_in_training_only(run: Callable[[int], Run], n: int) -> None:
    for rank in run(n).results:
        logits = rank["dropout"]
        assert torch.equal(logits["eval"], logits["without"])
        assert reference.relative_difference(logits["train"], logits["without"]) > 0.01


def test_dropout_and_its_gradients_equal_torch_s_own_of_the_same_draw() -> None:
    parallel.start()
    base = ColumnParallelLinear(6, 5, range(5))
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=6.0, dropout=0.4, targets=("wq",)))
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    base.weight.requires_grad_(False)
    given = [torch.randn(2, 3, 6, requires_grad=True), layer.lora_a.weight, layer.lora_b.weight]
    x, lora_a, lora_b = given
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    expected = F.linear(x, base.weight) + 3.0 * F.linear(F.linear(F.dropout(x, 0.4), lora_a), lora_b)
    torch.testing.assert_close(found, expected)
    of_result = torch.randn(found.shape)
    gradients = (torch.autograd.grad(each, given, of_result, retain_graph=True) for each in (found, expected))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_rows_of_zeros_stay_zeros_under_dora() -> None:
    """Widths that were padded have some; their length is no divisor."""
    parallel.start()
    base = ColumnParallelLinear(6, 5, range(5))
    layer = LoraLinear(base, LoraConfig(rank=2, alpha=6.0, dropout=0.0, targets=("wq",), dora=True))
    with torch.no_grad():
        for name, value in init_lora(nn.ModuleDict({"wq": layer}), 1, lambda name, whole: whole):
            layer.get_parameter(name.removeprefix("wq.")).copy_(value)
        base.weight.copy_(torch.randn(5, 6)).index_fill_(0, torch.tensor([1, 4]), 0.0)
        layer.lora_m.weight.copy_(layer.row_lengths(base.weight))
    base.weight.requires_grad_(False)
    x, learnt = torch.randn(3, 6), [layer.lora_a.weight, layer.lora_b.weight, layer.lora_m.weight]
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, base.weight))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), learnt))
    merged = at_length(base.weight, torch.full((5,), 2.0), base.weight.square().sum(1))
    torch.testing.assert_close(merged.norm(dim=1), torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0]))


@pytest.mark.parametrize("n", SIZES)
def test_ranks_drop_what_one_drops(run: Callable[[int], Run], n: int) -> None:
    (one,), ranks = run(1).results, run(n).results
    for rank in ranks:
        assert torch.equal(rank["dropout"]["train"], ranks[0]["dropout"]["train"])
        torch.testing.assert_close(rank["dropout"]["train"], one["dropout"]["train"], rtol=0, atol=1e-5)


def test_verifier_keeps_its_value_head_in_the_adapter_directory(run: Callable[[int], Run]) -> None:
    scores = run(2).results[0]["verifier"]
    torch.testing.assert_close(scores["loaded"], scores["saved"], rtol=0, atol=1e-5)
    assert scores["saved"].abs().max() > 0.1
    adapter = storage.read_shard(storage.shard_paths(run(2).base / "../verifier", storage.ADAPTER)[0])
    assert sorted({name.split(".")[-2] for name in adapter}) == ["lora_a", "lora_b", "v_head"]


def test_changed_base_is_refused(tmp_path: Path, hf_folder: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    source = open_source(str(hf_folder))
    split(source, base, 1, "gqa")
    adapter.mkdir()
    lora = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("wq",))
    write_json(adapter / "adapter.json", adapters.document(base, lora))
    assert adapters.read_adapter(adapter).base == base
    values = adapters.document(base, lora)
    for change, message in (
        ({"use_dora": True}, "key 'use_dora' is unknown"),
        ({"alpha": float("nan")}, "a number"),
    ):
        write_json(adapter / "adapter.json", values | change)
        with pytest.raises(UserError, match=rf"adapter\.json: .*{message}"):
            adapters.read_adapter(adapter)
    write_json(adapter / "adapter.json", values)
    split(source, base, 1, "gqa", "bfloat16")
    with pytest.raises(UserError, match=r"adapter\.json: the base .*base has changed"):
        adapters.read_adapter(adapter)


@pytest.mark.parametrize("lacking", ["lora_a", "lora_b", "lora_m"])
def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path: Path, hf_folder: Path, lacking: str) -> None:
    """Without one lora_a the others would be folded alone, without one lora_m that matrix by LoRA in place of DoRA."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    split(open_source(str(hf_folder)), base, 1, "gqa")
    lora = LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("wq", "wo"), dora=True)
    shapes = adapters.expected_shapes(read_config(base), lora)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    parallel.start()
    for gone in ("", f"layers.1.attention.wq.{lacking}.weight"):
        tensors.pop(gone, None)
        with storage.writing(adapter):
            storage.write_shard(adapter, storage.ADAPTER, 0, tensors)
            documents = {"adapter.json": adapters.document(base, lora), "params.json": read_config(base).to_dict()}
            storage.finish(adapter, 1, documents, [], {})
        for read in (open_adapter, lambda folder: load.load_solver(str(folder))):
            if not gone:
                read(adapter)
                continue
            with pytest.raises(UserError, match=f"'{gone}' is missing; expected the tensors that adapter.json"):
                read(adapter)


@pytest.mark.parametrize("n", [1, 2])
def test_an_adapter_of_another_rank_than_it_says_is_refused(tmp_path: Path, hf_folder: Path, n: int) -> None:
    """Its scale, alpha / rank, would be another one."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    split(open_source(str(hf_folder)), base, 1, "gqa")
    lora = LoraConfig(rank=2, alpha=2.0, dropout=0.0, targets=("wq",))
    shapes = adapters.expected_shapes(read_config(base), lora)
    tensors = {name: StoredTensor(shape, partial(torch.ones, shape), torch.float32) for name, shape in shapes.items()}
    split(AdapterSource(read_config(base), tensors, lora, base, adapter, []), tmp_path / "out", n, "an adapter")
    values = read_json(tmp_path / "out" / "adapter.json")
    write_json(tmp_path / "out" / "adapter.json", values | {"rank": 4})
    parallel.start()
    for read in (open_source, load.load_solver):
        with pytest.raises(UserError, match=r"lora_a.weight is \[2, 32\], but adapter.json .* mean \[4, 32\]"):
            source = read(str(tmp_path / "out"))
            source.tensors["layers.0.attention.wq.weight"].load()


def test_experts_carry_no_adapters() -> None:
    config = dataclasses.replace(CONFIG, n_experts=4, n_active_experts=2)
    lora = LoraConfig(rank=1, alpha=1.0, dropout=0.0, targets=("wq", "w2"))
    check_targets(lora, CONFIG)
    with pytest.raises(UserError, match="lora_targets names w2, but this model has experts"):
        check_targets(lora, config)
    check_targets(dataclasses.replace(lora, targets=("wq", "wo")), config)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": ()}, {"targets": ("wq", "q_proj")}],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"lora_{next(iter(wrong))}"):
        LoraConfig(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("wq",)} | wrong)
