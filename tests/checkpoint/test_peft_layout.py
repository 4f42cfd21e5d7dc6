"""src/checkpoint/peft_layout.py: adapters come from PEFT and go back, bit for bit, through any number of shards."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_split
from src import load
from src.checkpoint import export, peft_config, storage, verify
from src.checkpoint.sources import merge, open_adapter, open_source
from src.checkpoint.split import split
from src.errors import UserError
from tests import reference, tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_llama(tmp_path_factory.mktemp("hf"), "gqa")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """A trained-looking adapter of PEFT beside its base."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(reference.hf_model(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(base / "lora")
    return base / "lora"


def test_w2s_20_merged_adapter_computes_what_peft_computes(tmp_path: Path, base: Path, adapter: Path) -> None:
    export.export_hf(open_source(str(adapter), base_dir=str(base)), tmp_path, "adapter")
    tokens = reference.batch()[0]
    theirs = peft.PeftModel.from_pretrained(reference.hf_model(base), adapter)(tokens).logits
    assert reference.relative_difference(reference.hf_model(tmp_path)(tokens).logits, theirs) < 1e-5


def test_merged_equals_unmerged(base: Path, adapter: Path) -> None:
    opened = open_adapter(adapter, str(base))
    found = verify.logit_difference(opened, merge(opened))
    assert found.difference < 1e-5 * found.scale
    assert (
        verify.logit_difference(opened, open_source(str(base))).difference > 0.1
    )  # the adapter does something


@pytest.mark.parametrize("n", [1, 2, 3])
def test_peft_to_ours_to_peft_is_identical(tmp_path: Path, base: Path, adapter: Path, n: int) -> None:
    split(open_source(str(base)), tmp_path / "base", 2, "base")
    split(open_adapter(adapter, str(tmp_path / "base")), tmp_path / "ours", n, "adapter")
    assert len(storage.shard_paths(tmp_path / "ours", storage.ADAPTER)) == n
    export.export_peft(open_adapter(tmp_path / "ours"), tmp_path / "peft", "ours")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "peft")
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = reference.batch()[0]
    logits = [
        peft.PeftModel.from_pretrained(reference.hf_model(base), folder)(tokens).logits
        for folder in (adapter, tmp_path / "peft")
    ]
    assert torch.equal(*logits)


def test_dora_goes_through_shards_bit_for_bit(tmp_path: Path, base: Path) -> None:
    folder = save_variant(base, tmp_path / "lora", use_dora=True)
    split(open_source(str(base)), tmp_path / "base", 1, "base")
    split(open_adapter(folder, str(tmp_path / "base")), tmp_path / "ours", 3, "adapter")
    export.export_peft(open_adapter(tmp_path / "ours"), tmp_path / "peft", "ours")
    before, after = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "peft"))
    assert set(before) == set(after) and any("magnitude" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(peft_logits(base, folder), peft_logits(base, tmp_path / "peft"))


def test_adapter_goes_from_any_number_of_shards_to_any_other(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    split(open_source(str(base)), tmp_path / "base", 1, "base")
    folder = adapter
    for n in (3, 8, 2, 1):
        split(open_adapter(folder, str(tmp_path / "base")), tmp_path / str(n), n, "adapter")
        folder = tmp_path / str(n)
    once = tmp_path / "once"
    split(open_adapter(adapter, str(tmp_path / "base")), once, 1, "adapter")
    assert storage.fingerprint(folder) == storage.fingerprint(once)


RANKS = {"q_proj": 8, "layers.1.mlp.up_proj": 2}
ALPHAS = {r"^model\.layers\.0\.self_attn\.v_proj": 3, r".*\.1\.mlp\.(up|down)_proj": 0.5}
VARIANTS: dict[str, dict[str, object]] = {
    "rank-stabilised": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "patterns, rank-stabilised": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True},
    "one scale, ranks differ": {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"k_proj": 16}},
    "dora": {"use_dora": True},
    "dora, patterns, rank-stabilised": {
        "use_dora": True,
        "rank_pattern": RANKS,
        "alpha_pattern": ALPHAS,
        "use_rslora": True,
    },
    "dora, pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, rank-stabilised": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa, patterns": {"init_lora_weights": "pissa", "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "olora, patterns, rank-stabilised": {
        "init_lora_weights": "olora",
        "rank_pattern": RANKS,
        "use_rslora": True,
    },
    "olora, no scale": {"init_lora_weights": "olora", "lora_alpha": 0},
    "modules left out": {"exclude_modules": ["o_proj", "mlp.up_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer, patterns": {"layers_to_transform": 0, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "one layer, dora": {"layers_to_transform": 1, "use_dora": True},
    "one layer, pissa": {"layers_to_transform": 1, "init_lora_weights": "pissa"},
    "a module of one layer": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "v_proj"]},
    "a module that is named whole": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "q_proj", "v_proj"], "layers_to_transform": [1]
    },
    "a layer left out": {"exclude_modules": r".*\.layers\.0\..*"},
    "an expression": {
        "target_modules": r".*\.(self_attn|mlp)\.(k_proj|down_proj)",
        "init_lora_weights": "pissa",
    },
}


def save_variant(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """An adapter of PEFT of some kind, every factor moved as training would. Returns its directory."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | changes
    model = peft.get_peft_model(reference.hf_model(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(base)}))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(reference.hf_model(base), folder)(reference.batch()[0]).logits


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_compute_what_peft_computes(tmp_path: Path, base: Path, kind: str) -> None:
    """Merged, and as the plain adapter that stands for it: on the base as it is, in ours and in PEFT's format."""
    folder = save_variant(base, tmp_path / "lora", **VARIANTS[kind])
    theirs, opened = peft_logits(base, folder), open_adapter(folder)
    export.export_hf(merge(opened), tmp_path / "merged", "adapter")
    merged = reference.hf_model(tmp_path / "merged")(reference.batch()[0]).logits
    assert reference.relative_difference(merged, theirs) < 2e-5
    export.export_peft(opened, tmp_path / "plain", "adapter")
    assert reference.relative_difference(peft_logits(base, tmp_path / "plain"), theirs) < 2e-5
    for written in (merge(opened), open_adapter(tmp_path / "plain")):
        found = verify.logit_difference(opened, written)
        assert (
            found.difference < 1e-4 * found.scale
        )  # PEFT's singular vectors are float32, the measure's float64
    untouched = reference.hf_model(base)(reference.batch()[0]).logits
    assert reference.relative_difference(untouched, theirs) > 1e-2 or opened.lora.alpha == 0


@pytest.mark.parametrize("kind", ["rank-stabilised", "pissa, patterns", "olora"])
def test_variants_in_bfloat16_compute_what_peft_computes(tmp_path: Path, base: Path, kind: str) -> None:
    reference.hf_model(base).bfloat16().save_pretrained(tmp_path / "base")
    folder = save_variant(tmp_path / "base", tmp_path / "lora", torch.bfloat16, **VARIANTS[kind])
    split(open_source(str(tmp_path / "base")), tmp_path / "ours", 2, "base")
    for base_dir in ("", str(tmp_path / "ours")):
        opened = open_adapter(folder, base_dir)
        export.export_hf(merge(opened), tmp_path / "merged", "adapter", dtype="float32")
        merged = reference.hf_model(tmp_path / "merged")(reference.batch()[0]).logits
        assert reference.relative_difference(merged, peft_logits(tmp_path / "base", folder)) < 2e-5


def test_merge_onto_the_wrong_base_shows(tmp_path: Path, base: Path) -> None:
    """--verify measures against what PEFT does with the files, and not against what was read from them."""
    pissa = save_variant(base, tmp_path / "pissa", init_lora_weights="pissa")
    scaled = save_variant(base, tmp_path / "scaled", use_rslora=True, alpha_pattern={"v_proj": 1})
    for folder, change in (
        (pissa, {"init_lora_weights": True}),
        (scaled, {"use_rslora": False, "alpha_pattern": {}}),
    ):
        naive = shutil.copytree(folder, tmp_path / f"naive-{folder.name}")
        values = json.loads((naive / "adapter_config.json").read_text())
        (naive / "adapter_config.json").write_text(json.dumps(values | change))
        assert verify.logit_difference(open_adapter(folder), merge(open_adapter(naive))).difference > 0.1


def test_a_base_beside_the_adapter_is_found(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the folder above may hold another base where the tests are started
    shutil.copytree(base, tmp_path / "base")
    folder = shutil.copytree(adapter, tmp_path / "lora")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "../base"}))
    assert open_adapter(folder).base.resolve() == tmp_path / "base"


def test_an_adapter_beside_whole_weights_is_named_by_file(tmp_path: Path, base: Path, adapter: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "both")
    assert open_adapter(folder / "adapter_model.safetensors", str(base)).folder == folder
    shutil.copy(base / "model.safetensors", folder)
    with pytest.raises(
        UserError, match="both holds an adapter and whole weights, model.safetensors; name the file"
    ):
        open_source(str(folder), base_dir=str(base))
    plain = open_source(str(folder / "model.safetensors"), str(base / "config.json"))
    assert verify.logit_difference(plain, open_source(str(base))).difference == 0
    with pytest.raises(UserError, match="--config_file describes whole weights, but .* is an adapter"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(
                ckpt_file=str(adapter),
                save_path=str(tmp_path),
                config_file=str(base / "config.json"),
                base_dir=str(base),
            )
        )


def test_a_named_file_of_an_adapter_that_is_not_read_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    """PEFT keeps two forms of the tensors, and reads one."""
    folder = shutil.copytree(adapter, tmp_path / "both")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    assert open_adapter(folder, str(base)).folder == folder
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert open_adapter(folder / name, str(base)).folder == folder
    with pytest.raises(UserError, match=r"model\.bin is named, but .* read from adapter_model\.safetensors"):
        open_source(str(folder / "adapter_model.bin"), base_dir=str(base))
    (folder / "adapter_model.safetensors").unlink()
    assert open_adapter(folder / "adapter_model.bin", str(base)).folder == folder
    with pytest.raises(UserError, match="an adapter is read alone"):
        checkpoint_split.main(checkpoint_split.SplitConfig(
            ckpt_file=[str(folder), str(base)], save_path=str(tmp_path / "x"), base_dir=str(base)))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kept", [[], ["tokenizer.model"], ["tokenizer.model", "generation_config.json"]])
def test_what_ends_a_response_of_the_base_ends_one_of_the_adapted(
    tmp_path: Path, base: Path, adapter: Path, kept: list[str], merged: bool
) -> None:
    """PEFT's own directories hold a tokenizer and no generation_config.json: the base's holds for both."""
    base, folder = shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "lora")
    for place, ends in ((base, [2, 5]), (folder, [2, 7])):
        tiny.write_tokenizer(place)
        (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for name in {"tokenizer.model", "generation_config.json"} - set(kept):
        (folder / name).unlink()
    ours = tiny.split(base, tmp_path / "ours")
    checkpoint_split.main(checkpoint_split.SplitConfig(
        ckpt_file=str(folder), save_path=str(tmp_path / "out"), base_dir=ours, merge_lora=merged))
    assert load.load_tokenizer(str(tmp_path / "out")).stop_ids == {2, 7 if len(kept) == 2 else 5}


def test_an_adapter_on_an_adapter(tmp_path: Path, base: Path) -> None:
    """The lower one is merged first, whatever it does to its base; one that ends in itself is refused."""
    lower = save_variant(base, tmp_path / "lower", use_rslora=True)
    export.export_hf(open_source(str(lower)), tmp_path / "merged", "lower")
    for init in (True, "olora"):
        upper = save_variant(tmp_path / "merged", tmp_path / "upper", init_lora_weights=init)
        opened = open_adapter(upper, str(lower))
        found = verify.logit_difference(opened, merge(open_adapter(upper)))
        assert found.difference < 1e-4 * found.scale
    config = lower / "adapter_config.json"
    for folder in (lower, upper):
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)})
        )
        with pytest.raises(UserError, match="stands on itself"):
            open_adapter(upper, str(lower))


def test_published_adapters_that_change_their_base_or_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pissa", "olora"):
        folder = reference.shared("reports/PF1_pissa_olora") / name
        opened, theirs = open_adapter(folder), peft_logits(folder.parent / "base", folder)
        export.export_hf(merge(opened), tmp_path / name, name)
        merged = reference.hf_model(tmp_path / name)(reference.batch()[0]).logits
        assert reference.relative_difference(merged, theirs) < 2e-5
        found = verify.logit_difference(opened, open_source(str(tmp_path / name)))
        assert found.difference < 1e-4 * found.scale
    with pytest.raises(UserError, match=r"alora_invocation_tokens=\[3, 4\] is not implemented"):
        open_source(str(reference.shared("reports/PF2_alora") / "alora"))


def test_every_key_of_peft_is_known() -> None:
    """A new release of PEFT with a key that is not in the table fails here, not in somebody's weights."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - {"_custom_modules"} <= peft_config._KEYS.keys()


def test_every_value_that_is_not_known_to_be_right_is_refused(tmp_path: Path, adapter: Path) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    path = tmp_path / "adapter_config.json"
    for key, allowed in peft_config._KEYS.items():
        for value in (True, 1, 0, "all", [1], {"a": 1}) if allowed else ():
            if not any(type(value) is type(each) and value == each for each in allowed):
                path.write_text(json.dumps(values | {key: value}))
                with pytest.raises(UserError, match=rf"{key}=.* is not implemented"):
                    peft_config.read(tmp_path)
    for key, value in {"use_next": True, "next_config": {"a": None}, "next_rank": 0, "next_ids": [0]}.items():
        path.write_text(json.dumps(values | {key: value}))
        with pytest.raises(
            UserError, match=f"key '{key}' is unknown and may change what the adapter computes"
        ):
            peft_config.read(tmp_path)
    path.write_text(json.dumps(values | {"use_next": False, "next_config": None, "runtime_config": {"a": 1}}))
    assert peft_config.read(tmp_path).values["r"] == 4


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "dora without lengths": ({"use_dora": True}, r"lora_m\.weight is missing"),
    "other ranks": (
        {"rank_pattern": {"q_proj": 8}},
        r"wq\.lora_a\.weight is .4, 32., but r=8 and the base mean",
    ),
    "random start": (
        {"init_lora_weights": "pissa_niter_4"},
        "'pissa_niter_4' is not .*path_initial_model_for_weight",
    ),
    "gradients": (
        {"init_lora_weights": "lora_ga"},
        "'lora_ga' is not implemented; .*trained on another base",
    ),
    "covariances": ({"init_lora_weights": "corda"}, "'corda' is not implemented; .*trained on another base"),
    "quantised": ({"init_lora_weights": "loftq"}, "'loftq' is not implemented; .*trained on another base"),
    "divided by nothing": ({"init_lora_weights": "pissa", "lora_alpha": 0}, "divides by lora_alpha"),
    "another task": ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' is not implemented"),
    "a classifier without a score": (
        {"task_type": "SEQ_CLS"},
        "name the score layer .* but the tensors lack it",
    ),
    "no modules": ({"target_modules": None}, "target_modules=None; expected a list of names"),
    "fewer modules": (
        {"target_modules": TARGETS[1:]},
        r"adapter_config\.json leaves out model\.layers\.0\.self_attn\.q_proj, which has factors",
    ),
    "modules excluded": ({"exclude_modules": ".*up_proj"}, r"adapter_config.json leaves out .*mlp\.up_proj"),
    "fewer layers": ({"layers_to_transform": 1}, r"adapter_config.json leaves out model\.layers\.0\..*_proj"),
    "layers that are none": ({"layers_to_transform": ["1"]}, r"layers_to_transform=\['1'\]; expected numbers"),
    "layers and an expression": (
        {"layers_to_transform": [1], "target_modules": ".*_proj"},
        r"layers_to_transform=\[1\]; expected .* and a list for target_modules",
    ),
    "layers of another model": (
        {"layers_to_transform": [1], "layers_pattern": "h"},
        "layers_pattern='h' is not implemented",
    ),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*; expected names of modules"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern=.*; expected names of modules"),
    "no expression": ({"alpha_pattern": {"(q_proj": 8}}, "'.q_proj', no regular expression"),
    "endless expression": ({"rank_pattern": {"([a-z._0-9]+)+X": 8}}, "expected fewer repetitions"),
    "slow expression": ({"target_modules": ".*" * 20 + "X"}, "expected fewer repetitions"),
    "alpha that is none": ({"lora_alpha": float("nan")}, "expected a whole number"),
    "alpha beyond floats": ({"lora_alpha": 10**400}, "expected a whole number"),
    "truth as a rank": ({"r": True}, "r=True and lora_alpha=8; expected a whole number"),
    "biases": ({"bias": "all"}, "bias='all' is not implemented"),
    "saved modules": (
        {"modules_to_save": ["score", "embed_tokens"]},
        "modules_to_save=.* is not implemented",
    ),
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3' is not implemented; only LORA is"),
    "another rank": ({"r": 8}, "r=8 and the base mean"),
    "no rank": ({"r": "four"}, "r='four' and lora_alpha=8; expected a whole number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_we_cannot_do_is_refused(tmp_path: Path, base: Path, adapter: Path, case: str) -> None:
    change, message = CONFIGS[case]
    folder = shutil.copytree(adapter, tmp_path / "lora")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        open_adapter(folder, str(base))


def test_adapter_without_some_factors_or_its_base_is_refused(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    for gone, first in (("layers.1.self_attn.q_proj", "layers.1.attention.wq"),
                        (".gate_proj", "layers.0.feed_forward.w1")):  # of all layers: PEFT makes them anew
        kept = {name: tensor for name, tensor in tensors.items() if gone not in name}
        save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"{first}\.lora_a\.weight is missing"):
            open_adapter(folder, str(base))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"adapter_model.safetensors: '{name}' is stored as int8; expected float64, "):
        open_adapter(folder, str(base))
    with pytest.raises(UserError, match="is no directory here; name its base with --base_dir"):
        open_adapter(adapter, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"has no params\.json"):  # a base that no rank could open
        split(open_adapter(adapter, str(base)), tmp_path / "out", 2, "adapter")


def test_command_merges_keeps_and_verifies(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = str(tmp_path / "base")
    checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=str(base), save_path=ours, n=2))
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(adapter),
            save_path=str(tmp_path / "lora"),
            n=2,
            base_dir=ours,
            merge_lora=False,
            verify=True,
        )
    )
    assert "logits before and after: largest difference 0 of values" in capsys.readouterr().err
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(tmp_path / "lora"), save_path=str(tmp_path / "hf"), format="hf", verify=True
        )
    )
    difference = float(re.findall(r"largest difference (\S+) of", capsys.readouterr().err)[-1])
    assert difference < 1e-4
    checkpoint_split.main(
        checkpoint_split.SplitConfig(
            ckpt_file=str(tmp_path / "lora"), save_path=str(tmp_path / "peft"), format="peft"
        )
    )
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="is no adapter; write it with --format hf"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=ours, save_path=str(tmp_path / "x"), format="peft")
        )
    with pytest.raises(UserError, match="--base_dir names the base of an adapter, but .*base is none"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=ours, save_path=str(tmp_path / "x"), base_dir=ours)
        )
    with pytest.raises(UserError, match="--dtype changes whole weights: merge the adapter"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(
                ckpt_file=str(tmp_path / "lora"),
                save_path=str(tmp_path / "x"),
                merge_lora=False,
                dtype="bfloat16",
            )
        )
    for flags in ({"code_tokens": True}, {"verifier_form": "rlhflow"}):
        with pytest.raises(UserError, match=f"--verify compares with the adapter.s own .* with --{[*flags][0]}"):
            checkpoint_split.main(
                checkpoint_split.SplitConfig(
                    ckpt_file=str(tmp_path / "lora"), save_path=str(tmp_path / "x"), verify=True, **flags
                )
            )
    with pytest.raises(UserError, match="of ours but what adapter_config.json describes; bring it here with"):
        load.load_solver(str(adapter))
    with pytest.raises(UserError, match="--format hf holds whole weights: merge the adapter"):
        checkpoint_split.main(
            checkpoint_split.SplitConfig(
                ckpt_file=str(tmp_path / "lora"), save_path=str(tmp_path / "x"), format="hf", merge_lora=False
            )
        )
