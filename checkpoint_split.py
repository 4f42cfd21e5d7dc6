"""Split a checkpoint into tensor-parallel shards, reshard one, export it, or say what it is.

python checkpoint_split.py --ckpt_file llama-2-7b-hf --save_path ckpt/8 --n 8
python checkpoint_split.py --ckpt_file ckpt/8 --save_path llama-2-7b-tuned --format hf
python checkpoint_split.py --inspect ckpt/8
python checkpoint_split.py --certify ckpt/8
"""

import atexit
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from src import assemble, cli, parallel, plan, runlog
from src import certify as certificate
from src.checkpoint import export, sources, storage, training_state
from src.checkpoint.sources import AdapterSource, Source
from src.checkpoint.split import split, split_adapter, tokenizer_of
from src.config import Count, CountOrOff, CountOrZero, Counts, Positive
from src.errors import UserError
from src.models.foreign import check_model_type
from src.text.blocks import CODE_FORM, Marker
from src.text.extend import GENERATION, add_control_tokens, say_ends


def main(
    ckpt_file: str | list[str] = "", save_path: str = "", n: Count = 1,
    format: Literal["shards", "hf", "peft"] = "shards", inspect: str = "", base_dir: str = "",
    merge_lora: bool = True, verify: bool = False, verify_hashes: bool = True, max_shard_size: Positive = 5.0,
    tokenizer_file: str = "", config_file: str = "", model_type: str = "",
    dtype: Literal["", "float32", "bfloat16", "float16"] = "", num_added_tokens: CountOrZero = 0,
    code_tokens: bool = False,
    certify: str = "", certify_ranks: Counts = [1, 2, 4], certify_layers: CountOrOff = 2,  # noqa: B006 (never changed)
    dry_run: bool = False,
) -> None:
    """Cut a checkpoint into n shards, or write it in another format.

    ckpt_file: a .pth/.pt/.bin/.safetensors file, several of them, a Hugging Face or Meta directory, an
        adapter directory of PEFT, or a directory made here
    save_path: directory to write: tensors, params.json or config.json, the tokenizer and manifest.json
    n: number of shards; any number of tensor-parallel processes can open them, as many read fastest
    format: shards = consolidated.NN.pth; hf = what transformers opens; peft = an adapter as PEFT opens it
    inspect: a checkpoint to describe instead of writing one: sizes, and what 1, 2, 4 and 8 ranks would hold
    base_dir: the base of an adapter, if it is not where the adapter says
    merge_lora: merge an adapter into its base, in float32; false keeps it an adapter
    verify: afterwards compare the logits of what was written with the source's, an adapter's unmerged
    verify_hashes: compare the source with the hashes in its manifest before anything is written
    max_shard_size: largest file of --format hf, in GB
    tokenizer_file: tokenizer file of any kind to put beside the weights; default: the one beside ckpt_file
    config_file: params.json (Meta) or config.json (Hugging Face); default: the one beside ckpt_file
    model_type: a family or released size the checkpoint must agree with, such as llama-2-7b
    dtype: type of the stored weights; default: as in the source
    num_added_tokens: rows to put behind the vocabulary, each the mean of the rows that are there
    code_tokens: put the eight markers of solutions with code behind the tokenizer's vocabulary, each row the mean of
        those before; later commands then write such solutions, as --chat_template code
    certify: a directory made here to compute with instead, on several ranks of this CPU, padded, packed, decoded and
        with a chunked loss: how far logits, log-probs and gradients lie from a plain forward; status 1 beyond rounding
    certify_ranks: the tensor-parallel sizes of --certify; 1 is always among them
    certify_layers: the first so many layers take part in --certify; -1 = all
    dry_run: print the plan - parameters, heads and bytes of a shard or files, disk - and stop
    """
    if parallel.rank() != 0:  # under torchrun one process does the work
        return
    log = runlog.logger()
    if inspect:
        runlog.table(plan.inspection(*sources.describe(inspect)))
        return
    if certify:
        assemble.load_config(certify, kind="solver")
        if verify_hashes:
            storage.verify_hashes(Path(certify))
        found = certificate.certify(certify, certify_ranks, certify_layers)
        runlog.table(str(found))
        if not found.passed:
            raise UserError(f"{certify} computes differently where the table says DIFFERS; do not use it that way")
        return
    if not ckpt_file or not save_path:
        raise UserError("--ckpt_file and --save_path are needed: what to read and where to write; or --inspect DIR")
    if verify and num_added_tokens:
        raise UserError("--verify compares logits over one vocabulary; leave it out with --num_added_tokens")
    if verify and parallel.world_size() > 1:
        raise UserError("--verify computes with one process; start this script with python, not with torchrun")
    described = ckpt_file if isinstance(ckpt_file, str) else ", ".join(ckpt_file)
    adapter = sources.open_adapter(Path(ckpt_file if isinstance(ckpt_file, str) else ckpt_file[0]), base_dir)
    keep = adapter is not None and (format == "peft" or not merge_lora)
    if format == "peft" and not keep:
        raise UserError(f"--format peft: {described} is no adapter; write it with --format hf")
    if format == "hf" and keep:
        raise UserError("--format hf holds whole weights: merge the adapter, or write it with --format peft")
    if base_dir and adapter is None:
        raise UserError(f"--base_dir names the base of an adapter, but {described} is none")
    if config_file and adapter:
        raise UserError(f"--config_file describes whole weights, but {described} is an adapter, described by its base")
    changes = {"--num_added_tokens": num_added_tokens, "--code_tokens": code_tokens, "--dtype": dtype}
    if keep and any(changes.values()):
        raise UserError(f"{' '.join(filter(changes.get, changes))} changes whole weights: merge the adapter")
    source = adapter if keep else sources.open_source(ckpt_file, config_file, base_dir)
    check_model_type(source.config, model_type, described)
    if num_added_tokens:
        source = sources.with_added_tokens(source, num_added_tokens)
    if code_tokens:
        source, tokenizer_file = with_code_tokens(source, tokenizer_file, described)
    if (sources.folders_of(source)[0] / training_state.STATE).is_file():
        log.warning("%s is a training checkpoint: its weights are written, and its optimizer and place in the run are "
                    "left out. --resume opens it as it is, on any number of ranks", described)
    if dry_run:
        adapted = plan.adapting(source.config, source.lora, 1 if format == "peft" else n) if keep else None
        whole = plan.exporting(source.config, dtype, int(max_shard_size * 10**9)) if format == "hf" else None
        runlog.table(adapted or whole or plan.splitting(source.config, n, dtype))
        return
    if verify_hashes:
        for folder in sources.folders_of(source):
            storage.verify_hashes(folder)
    source, tokenizer_file = with_ends(source, tokenizer_file, format)
    target = Path(save_path)
    if format == "peft":
        not_finite = export.export_peft(source, target, described, tokenizer_file)
    elif format == "hf":
        not_finite = export.export_hf(source, target, described, dtype=dtype, tokenizer_file=tokenizer_file,
                                      max_shard_bytes=int(max_shard_size * 10**9))
    elif keep:
        not_finite = split_adapter(source, target, n, tokenizer_file, described)
    else:
        not_finite = split(source, target, n, dtype, tokenizer_file, described)
    for name in not_finite:
        log.warning("%s holds NaN or infinity: the source is damaged, or its training diverged", name)
    log.info("wrote %s to %s", f"{n} shards of {described}" if format == "shards" else described, save_path)
    if not tokenizer_file and not source.tokenizer_files:
        log.warning("no tokenizer lies beside %s: give --tokenizer_file, or one to every later command", described)
    if verify:
        written = sources.open_adapter(target, base_dir) or sources.open_source(save_path)
        log.info("logits before and after: %s", assemble.logit_difference(adapter or source, written))


def with_code_tokens(source: Source, tokenizer_file: str, described: str) -> tuple[Source, str]:
    """A checkpoint whose vocabulary has the markers of solutions with code, and the directory of its tokenizer."""
    files = storage.tokenizer_files(Path(tokenizer_file)) if tokenizer_file else source.tokenizer_files
    if not files:
        raise UserError(f"--code_tokens extends a tokenizer, but none lies beside {described}; give --tokenizer_file")
    folder = copy_of(files)
    first = add_control_tokens(folder, list(Marker), files[0].parent)
    source = sources.with_added_tokens(source, len(Marker), first)
    return source._replace(config=dataclasses.replace(source.config, chat_template=CODE_FORM)), str(folder)


def with_ends(
    source: Source | AdapterSource, tokenizer_file: str, format: str
) -> tuple[Source | AdapterSource, str]:
    """A checkpoint and the directory of its tokenizer, where both say what ends a response, and an export the template.

    Shards only need what config.json alone said: their params.json knows the rest.
    """
    files = tokenizer_of(source.tokenizer_files, tokenizer_file)
    carried = source.config.carried
    ids = {key: carried[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in carried}
    if not files or (format == "shards" and any(file.name == GENERATION for file in files)):
        return source, tokenizer_file
    if format == "shards" and ids.get("eos_token_id") is None:
        return source, tokenizer_file
    folder = copy_of(files)
    ids = say_ends(folder, "" if format == "shards" else source.config.chat_template, ids)
    return source._replace(config=dataclasses.replace(source.config, carried=carried | ids)), str(folder)


def copy_of(files: list[Path]) -> Path:
    """A directory of these files of a tokenizer, which is gone when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    storage.copy_tokenizer(files, folder)
    return folder


if __name__ == "__main__":
    cli.run(main)
