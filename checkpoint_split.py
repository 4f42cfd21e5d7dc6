"""Split a checkpoint into tensor-parallel shards, reshard one, export it, or say what it is.

python checkpoint_split.py --ckpt_file llama-2-7b-hf --save_path ckpt/8 --n 8
python checkpoint_split.py --ckpt_file ckpt/8 --save_path llama-2-7b-tuned --format hf
python checkpoint_split.py --ckpt_file ckpt/8 --save_path llama-2-7b-gguf --format gguf --dtype q8_0
python checkpoint_split.py --inspect ckpt/8
python checkpoint_split.py --certify ckpt/8
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from src import load, parallel, runlog
from src.checkpoint import export, gguf_layout, saving, sources, storage, verify
from src.checkpoint.foreign_config import check_model_type
from src.checkpoint.sources import AdapterSource, Source
from src.checkpoint.split import as_verifier, split, with_added_tokens, with_tokenizer
from src.command import cli
from src.command.config import Config, Count, CountOrOff, CountOrZero, Counts, Positive, flag
from src.errors import UserError
from src.jsonfile import read_json
from src.planning import plan
from src.text.blocks import CODE_FORM, Marker
from src.text.chat import has_own_template
from src.text.extend import GENERATION, add_control_tokens, say_ends
from src.text.gguf_tokenizer import spaces_apart, tokenizer_metadata
from src.text.tokenizer import Tokenizer
from tools.certify import certify


@dataclass(frozen=True, kw_only=True)
class SplitConfig(Config):
    """Splitting"""

    ckpt_file: str | list[str] = flag("", """a .pth/.pt/.bin/.safetensors file, several of them, a .gguf file, a
        Hugging Face or Meta directory, an adapter directory of PEFT, or a directory made here""")
    save_path: str = flag("", """directory to write: tensors, params.json or config.json, the tokenizer and
        manifest.json""")
    n: Count = flag(1, """number of shards; any number of tensor-parallel processes can open them, as many
        read fastest""")
    format: Literal["shards", "hf", "peft", "gguf"] = flag("shards", """shards = consolidated.NN.pth; hf = what
        transformers opens; peft = an adapter as PEFT opens it; gguf = one file as llama.cpp opens it""")
    inspect: str = flag("", """a checkpoint to describe instead of writing one: sizes, and what 1, 2, 4 and 8
        ranks would hold""")
    base_dir: str = flag("", "the base of an adapter, if it is not where the adapter says")
    merge_lora: bool = flag(True, "merge an adapter into its base, in float32; false keeps it an adapter")
    verify: bool = flag(False, """afterwards compare the logits of what was written with the source's, an
        adapter's unmerged; more than rounding explains is an error""")
    verify_hashes: bool = flag(True, """compare the source with the hashes in its manifest before anything is
        written""")
    max_shard_size: Positive = flag(5.0, "largest file of --format hf, in GB")
    tokenizer_file: str = flag("", """tokenizer file of any kind to put next to the weights; default: the
        one next to ckpt_file""")
    config_file: str = flag("", """params.json (Meta) or config.json (Hugging Face); default: the one next to
        ckpt_file""")
    model_type: str = flag("", "a family or released size the checkpoint must agree with, such as llama-2-7b")
    dtype: Literal["", "float32", "bfloat16", "float16", "q8_0"] = flag("", """type of the stored weights; default: as
        in the source, float32 where that is a quantised .gguf; q8_0 is of --format gguf alone""")
    num_added_tokens: CountOrZero = flag(0, """rows to put after the vocabulary, each the mean of the rows
        that are there""")
    code_tokens: bool = flag(False, """put the eight markers of solutions with code after the tokenizer's
        vocabulary, each row the mean of those before; later commands then write such solutions, as
        --chat_template code""")
    verifier_form: Literal["", "math-shepherd", "rlhflow"] = flag("", """make a process verifier of a model that says
        "+" after a right step and "-" after a wrong one, and show it steps as Math-Shepherd's or RLHFlow's training
        did; Qwen2.5-Math-PRM's form is known by its weights""")
    certify: str = flag("", """a directory made here to compute with instead, on several ranks of this CPU,
        padded, packed, decoded and with a chunked loss: how far logits, log-probs and gradients lie from a
        plain forward; status 1 beyond rounding""")
    certify_ranks: Counts = flag([1, 2, 4], """the tensor-parallel sizes of --certify; 1 is always among them""")
    certify_layers: CountOrOff = flag(2, "the first so many layers take part in --certify; -1 = all")


def main(config: SplitConfig) -> None:
    """Cut a checkpoint into n shards, or write it in another format."""
    if parallel.rank() != 0:  # under torchrun one process does the work
        return
    log = runlog.logger()
    refuse_without_effect(config)
    if config.inspect:
        runlog.table(plan.inspection(*sources.describe(config.inspect)))
        return
    if config.certify:
        load.load_config(config.certify, kind="solver")
        if config.verify_hashes:
            storage.verify_hashes(Path(config.certify))
        found = certify(config.certify, config.certify_ranks, config.certify_layers)
        runlog.table(str(found))
        if not found.passed:
            raise UserError(f"{config.certify} computes differently where the table says DIFFERS; do not use it so")
        return
    files = [config.ckpt_file] if isinstance(config.ckpt_file, str) else config.ckpt_file
    described = ", ".join(files)
    adapter = sources.open_adapter(Path(files[0]), config.base_dir) if described else None
    keep = adapter is not None and (config.format == "peft" or not config.merge_lora)
    refuse_contradictions(config, described, has_adapter=adapter is not None, keep=keep)
    if keep:
        source = adapter
    elif adapter:
        source = sources.merge(adapter, config.dtype or adapter.config.dtype, "--dtype float32 stores all of it")
    else:
        source = sources.open_source(config.ckpt_file, config.config_file, own_tokenizer=not config.tokenizer_file)
    source = with_tokenizer(source, config.tokenizer_file)
    check_model_type(source.config, config.model_type, described)
    if config.num_added_tokens:
        source = with_added_tokens(source, config.num_added_tokens)
    if config.code_tokens:
        source = with_code_tokens(source, described)
    if config.verifier_form:
        source = as_verifier(source, config.verifier_form, tokenizer_of(source, "verifier_form", described))
    if (source.folders[0] / saving.STATE).is_file():
        log.warning("%s is a training checkpoint: its weights are written, and its optimizer and place in the run are "
                    "left out. --resume opens it as it is, on any number of ranks", described)
    max_shard_bytes = int(config.max_shard_size * 10**9)
    if config.dry_run:
        if keep:
            text = plan.adapting(source.config, source.lora, 1 if config.format == "peft" else config.n)
        elif config.format == "hf":
            text = plan.exporting(source.config, config.dtype, max_shard_bytes)
        elif config.format == "gguf":
            gguf_layout.as_gguf(source.config, source.tensors, "", described)
            text = plan.exporting(source.config, config.dtype)
        else:
            text = plan.splitting(source.config, config.n, config.dtype)
        runlog.table(text)
        return
    if config.verify_hashes:
        for folder in source.folders:
            storage.verify_hashes(folder)
    source = with_ends(source, config.format)
    target = Path(config.save_path)
    if config.format == "peft":
        not_finite = export.export_peft(source, target, described)
    elif config.format == "hf":
        not_finite = export.export_hf(source, target, described, dtype=config.dtype, max_shard_bytes=max_shard_bytes)
    elif config.format == "gguf":
        not_finite = write_gguf(source, target, config.dtype, described)
    else:
        not_finite = split(source, target, config.n, described, config.dtype)
    for name in not_finite:
        log.warning("%s holds NaN or infinity: the source is damaged, or its training diverged", name)
    written = f"{config.n} shards of {described}" if config.format == "shards" else described
    log.info("wrote %s to %s", written, config.save_path)
    if not storage.has_vocabulary(source.tokenizer_files):
        log.warning("no tokenizer lies beside %s: give --tokenizer_file, or one to every later command", described)
    if config.format == "shards" and not source.config.chat_template and has_own_template(target):
        log.info("%s has a chat template: give --chat_template file to the commands that show it prompts, or none for "
                 "raw ones; training records it for later commands", config.save_path)
    if config.verify:
        verify_written(config, adapter or source)


def verify_written(config: SplitConfig, before: sources.Source | sources.AdapterSource) -> None:
    """Compare the logits of what was written with those from before. Raises UserError where rounding does not explain
    how far they lie apart."""
    after = sources.open_adapter(Path(config.save_path), config.base_dir) or sources.open_source(config.save_path)
    found = verify.logit_difference(before, after)
    runlog.logger().info("logits before and after: %s", found)
    rounded = verify.rounded_to(before, after, config.dtype)
    if rounded == "float32" or not before.config.n_experts:  # another last bit may choose another expert
        verify.check_difference(found, config.save_path, rounded)


def refuse_without_effect(config: SplitConfig) -> None:
    """Raise UserError for flags of which nothing would come beside those that say what is to be done."""
    every, of_certify = config.flags().keys(), {"certify_ranks", "certify_layers"}
    for is_so, names, why in (
        (config.inspect, every - {"inspect"}, "--inspect describes a checkpoint, and writes none"),
        (config.certify, every - {"certify", "verify_hashes"} - of_certify, "--certify writes no checkpoint"),
        (not config.certify, of_certify, "there is no --certify"),
        (config.format != "shards", ("n",), f"--format {config.format} is not cut into shards"),
        (config.format != "hf", ("max_shard_size",), "it is of --format hf alone"),
    ):
        config.refuse(names if is_so else (), why)


def refuse_contradictions(config: SplitConfig, described: str, *, has_adapter: bool, keep: bool) -> None:
    """Raise UserError for flags that do not go together, or not with what was found. keep: an adapter stays one."""
    changes = [name for name in ("num_added_tokens", "code_tokens", "verifier_form", "dtype") if getattr(config, name)]
    others = [name for name in changes if name != "dtype"]
    whole = config.format in ("hf", "gguf")
    for is_wrong, message in (
        (not described or not config.save_path,
         "--ckpt_file and --save_path are needed: what to read and where to write; or --inspect DIR"),
        (config.verify and config.num_added_tokens,
         "--verify compares logits over one vocabulary; leave it out with --num_added_tokens"),
        (config.verify and has_adapter and others,
         f"--verify compares with the adapter's own logits; leave it out with --{' --'.join(others)}"),
        (config.verify and parallel.world_size() > 1,
         "--verify computes with one process; start this script with python, not with torchrun"),
        (config.format == "peft" and not keep, f"--format peft: {described} is no adapter; write it with --format hf"),
        (whole and keep,
         f"--format {config.format} holds whole weights: merge the adapter, or write it with --format peft"),
        (config.dtype == "q8_0" and config.format != "gguf",
         "--dtype q8_0 is a type of GGUF files; give --format gguf, or another type"),
        (config.base_dir and not has_adapter,
         f"--base_dir names the base of an adapter, but {described} is none"),
        (not config.merge_lora and not has_adapter,
         f"--merge_lora false keeps an adapter one, but {described} is none"),
        (config.config_file and has_adapter,
         f"--config_file describes whole weights, but {described} is an adapter, described by its base"),
        (has_adapter and isinstance(config.ckpt_file, list) and len(config.ckpt_file) > 1,
         f"--ckpt_file {described}: an adapter is read alone, from its directory"),
        (keep and changes, f"--{' --'.join(changes)} changes whole weights: merge the adapter"),
    ):
        if is_wrong:
            raise UserError(message)


def write_gguf(source: Source, target: Path, dtype: str, described: str) -> list[str]:
    """Write a checkpoint with its tokenizer for llama.cpp. -> the tensors with NaN or infinity."""
    if not storage.has_vocabulary(source.tokenizer_files):
        raise UserError(f"--format gguf holds a tokenizer, but none lies beside {described}; give --tokenizer_file")
    folder = source.tokenizer_files[0].parent
    metadata = tokenizer_metadata(folder, source.config.vocab_size)
    if told := spaces_apart(folder):
        runlog.logger().warning("the tokenizer of %s %s", described, told)
    return export.export_gguf(source, target, described, metadata, dtype=dtype)


def tokenizer_of(source: Source, name: str, described: str) -> Tokenizer:
    """The tokenizer beside a checkpoint, which the flag of this name needs. Raises UserError for none, or one of whose
    tokens the checkpoint embeds but a part."""
    files = source.tokenizer_files
    if not storage.has_vocabulary(files):
        raise UserError(f"--{name} needs a tokenizer, but none lies beside {described}; give --tokenizer_file")
    tokenizer, rows = Tokenizer(files[0]), source.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(f"{tokenizer.path} has {tokenizer.vocab_size} pieces but {described} embeds {rows}; give the "
                        "tokenizer that the checkpoint was trained with")
    return tokenizer


def with_code_tokens(source: Source, described: str) -> Source:
    """A checkpoint whose vocabulary, of model and tokenizer, has the markers of solutions with code."""
    tokenizer = tokenizer_of(source, "code_tokens", described)
    folder = copy_of(source.tokenizer_files)
    first = add_control_tokens(folder, list(Marker), tokenizer.path.parent)
    source = with_added_tokens(source, len(Marker), first)
    return source._replace(config=dataclasses.replace(source.config, chat_template=CODE_FORM),
                           tokenizer_files=storage.tokenizer_files(folder))


def with_ends(source: Source | AdapterSource, format: str) -> Source | AdapterSource:
    """A checkpoint whose config and tokenizer say what ends a response, and in an export the template. Shards only need
    what config.json alone said: their params.json knows the rest."""
    files, carried = source.tokenizer_files, source.config.carried
    ids = {key: carried[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in carried}
    said = any(file.name == GENERATION and read_json(file).get("eos_token_id") is not None for file in files)
    if not files or (format == "shards" and (said or ids.get("eos_token_id") is None)):
        return source
    folder = copy_of(files)
    chosen = "" if format == "shards" else source.config.chat_template
    facts = {name: getattr(source.config, name) for name in ("template_args", "system_prompt")} if chosen else {}
    ids = say_ends(folder, chosen, ids, **facts, for_llama_cpp=format == "gguf")
    return source._replace(config=dataclasses.replace(source.config, carried=carried | ids),
                           tokenizer_files=storage.tokenizer_files(folder))


def copy_of(files: list[Path]) -> Path:
    """A directory of these files of a tokenizer, which is gone when the process ends."""
    folder = storage.temporary_folder()
    storage.copy_tokenizer(files, folder)
    return folder


if __name__ == "__main__":
    cli.run(main)
