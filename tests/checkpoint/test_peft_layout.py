"""src/checkpoint/peft_layout.py: adapters come from PEFT and go back, bit for bit, through any number of shards."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint_split
from src import assemble
from src.checkpoint import export, storage
from src.checkpoint.sources import merge, open_adapter, open_source
from src.checkpoint.split import split, split_adapter
from src.errors import UserError
from tests import reference

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
    found = assemble.logit_difference(opened, merge(opened))
    assert found.difference < 1e-5 * found.scale
    assert (
        assemble.logit_difference(opened, open_source(str(base))).difference > 0.1
    )  # the adapter does something


@pytest.mark.parametrize("n", [1, 2, 3])
def test_peft_to_ours_to_peft_is_identical(tmp_path: Path, base: Path, adapter: Path, n: int) -> None:
    split(open_source(str(base)), tmp_path / "base", 2, "", "", "base")
    split_adapter(open_adapter(adapter, str(tmp_path / "base")), tmp_path / "ours", n, "", "adapter")
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


def test_adapter_goes_from_any_number_of_shards_to_any_other(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    split(open_source(str(base)), tmp_path / "base", 1, "", "", "base")
    folder = adapter
    for n in (3, 8, 2, 1):
        split_adapter(open_adapter(folder, str(tmp_path / "base")), tmp_path / str(n), n, "", "adapter")
        folder = tmp_path / str(n)
    once = tmp_path / "once"
    split_adapter(open_adapter(adapter, str(tmp_path / "base")), once, 1, "", "adapter")
    assert storage.fingerprint(folder) == storage.fingerprint(once)


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True is not implemented"),
    "rank-stabilised": ({"use_rslora": True}, "use_rslora=True is not implemented"),
    "other ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not implemented"),
    "biases": ({"bias": "all"}, "bias='all' is not implemented"),
    "saved modules": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=.* is not implemented"),
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


def test_adapter_of_some_layers_or_without_its_base_is_refused(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wq\.lora_a\.weight is missing"):
        open_adapter(folder, str(base))
    with pytest.raises(UserError, match="is no directory here; name its base with --base_dir"):
        open_adapter(adapter, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"has no params\.json"):  # a base that no rank could open
        split_adapter(open_adapter(adapter, str(base)), tmp_path / "out", 2, "", "adapter")


def test_command_merges_keeps_and_verifies(
    tmp_path: Path, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="splitrl")
    ours = str(tmp_path / "base")
    checkpoint_split.main(str(base), ours, 2)
    checkpoint_split.main(
        str(adapter), str(tmp_path / "lora"), 2, base_dir=ours, merge_lora=False, verify=True
    )
    assert "logits before and after: largest difference 0 of values" in caplog.text
    checkpoint_split.main(str(tmp_path / "lora"), str(tmp_path / "hf"), format="hf", verify=True)
    difference = float(re.findall(r"largest difference (\S+) of", caplog.text)[-1])
    assert difference < 1e-4
    checkpoint_split.main(str(tmp_path / "lora"), str(tmp_path / "peft"), format="peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="is no adapter; write it with --format hf"):
        checkpoint_split.main(ours, str(tmp_path / "x"), format="peft")
    with pytest.raises(UserError, match="--format hf holds whole weights: merge the adapter"):
        checkpoint_split.main(str(tmp_path / "lora"), str(tmp_path / "x"), format="hf", merge_lora=False)
