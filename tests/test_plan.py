"""The plan of --dry_run says what a run will really hold."""

from pathlib import Path

import pytest
from torch import Tensor

import checkpoint_split
import solver_train
from src import assemble, parallel, plan
from src.checkpoint import sources, storage
from src.checkpoint.tensor_files import read_safetensors
from src.memory import local_lora_parameters, local_parameters
from tests import tiny
from tests.conftest import Folders
from tests.test_memory import LORA


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes_as_a_person_reads_them(n_bytes: int, text: str) -> None:
    assert plan.size(n_bytes) == text


def test_the_plan_counts_what_shards_and_loaded_models_hold(tmp_path: Path) -> None:
    source = tiny.write_hf_llama(tmp_path / "hf")
    halves = tiny.split(source, tmp_path / "two", n=2)
    config = assemble.load_config(halves)
    for path in storage.shard_paths(Path(halves)):
        held = sum(tensor.numel() for tensor in storage.read_shard(path).values())
        assert held == local_parameters(config, 2)
    parallel.start()
    model = assemble.load_verifier(tiny.split(source, tmp_path / "one"), from_solver=True)
    assert sum(p.numel() for p in model.parameters()) == local_parameters(model.config, 1)
    assemble.put_lora_on(model, LORA, seed=1)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == local_lora_parameters(model.config, LORA, 1)


def test_inspection_says_what_each_number_of_ranks_would_hold(tmp_path: Path) -> None:
    halves = tiny.split(tiny.write_hf_llama(tmp_path / "hf"), tmp_path / "two", n=2)
    facts, _, table = plan.inspection(*sources.describe(halves), ranks=(1, 3, 8, 9)).partition("\n\n")
    assert "llama, a solver" in facts
    assert "float32, " in facts and "shards: 2" in facts
    assert "8 query, 4 key-value, of 4" in facts
    one, three, eight, nine = table.splitlines()[1:]
    assert one.split()[:3] == [
        "1",
        plan.size(4 * local_parameters(assemble.load_config(halves), 1)).split()[0],
        "KiB",
    ]
    assert "uneven: 2 to 4 query heads; 2 rows of padding in the vocabulary" in three
    assert "each key-value head lies on 2 ranks" in eight
    assert "n_heads=8 leaves nothing to do for shard" in nine


def test_a_split_s_plan_is_of_the_form_that_is_asked_for(
    tmp_path: Path, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards, Hugging Face's files, an adapter: what the plan says the disk must hold, it holds afterwards."""
    adapter = tmp_path / "adapter"
    rows = '[{"instruction": "1+1=", "output": "2"}]'
    (tmp_path / "rows.json").write_text(rows)
    solver_train.main(
        solver_train.SolverTrainConfig(
            ckpt_dir=folders.one,
            save_dir=str(adapter),
            train_file=str(tmp_path / "rows.json"),
            lora_rank=2,
            max_steps=1,
        )
    )
    for source, flags, word in (
        (folders.one, {"format": "hf"}, "files"),
        (str(adapter), {"format": "peft"}, "adapter"),
        (folders.one, {"n": 2}, "shards"),
    ):
        target = tmp_path / "written" / word
        capsys.readouterr()
        checkpoint_split.main(
            checkpoint_split.SplitConfig(ckpt_file=source, save_path=str(target), dry_run=True, **flags)
        )
        told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert word in told and not target.exists()
        checkpoint_split.main(checkpoint_split.SplitConfig(ckpt_file=source, save_path=str(target), **flags))
        tensors = [
            tensor
            for path in target.iterdir()
            if path.suffix in (".safetensors", ".pth")
            for tensor in read(path)
        ]
        assert told["disk"].strip() == plan.size(sum(tensor.nbytes for tensor in tensors))


def read(path: Path) -> list[Tensor]:
    if path.suffix == ".pth":
        return list(storage.read_shard(path).values())
    return [stored.load() for stored in read_safetensors(path).values()]
