"""Split a checkpoint into tensor-parallel shards, or reshard one.

python checkpoint_split.py --ckpt_file llama-2-7b-hf --save_path ckpt/8 --n 8
"""

from pathlib import Path
from typing import Literal

from src import cli, parallel, plan, runlog
from src.checkpoint.sources import open_source
from src.checkpoint.split import split
from src.models.families import check_model_type


def main(
    ckpt_file: str | list[str], save_path: str, n: int, tokenizer_file: str = "", config_file: str = "",
    model_type: str = "", dtype: Literal["", "float32", "bfloat16", "float16"] = "", dry_run: bool = False,
) -> None:
    """Cut a checkpoint into n shards.

    ckpt_file: a .pth/.pt/.bin/.safetensors file, several of them, a Hugging Face or Meta directory, or a
        directory made here (full weights or an adapter, which is merged into its base)
    save_path: directory for consolidated.NN.pth, params.json, the tokenizer and manifest.json
    n: number of shards = tensor-parallel processes that will open them
    tokenizer_file: sentencepiece model to put beside the shards; default: the one beside ckpt_file
    config_file: params.json (Meta) or config.json (Hugging Face); default: the one beside ckpt_file
    model_type: a family or released size the checkpoint must agree with, such as llama-2-7b
    dtype: type of the stored weights; default: as in the source
    dry_run: print the plan - parameters, heads and bytes of a shard, disk - and stop
    """
    cli.check_numbers(locals())
    if parallel.rank() != 0:  # under torchrun one process does the work
        return
    log = runlog.logger()
    source = open_source(ckpt_file, config_file)
    described = ckpt_file if isinstance(ckpt_file, str) else ", ".join(ckpt_file)
    check_model_type(source.config, model_type, described)
    if dry_run:
        runlog.table(plan.splitting(source.config, n, dtype))
        return
    split(source, Path(save_path), n, dtype, tokenizer_file, described)
    log.info("wrote %d shards of %s to %s", n, described, save_path)
    if not tokenizer_file and not source.tokenizer_files:
        log.warning("no tokenizer lies beside %s: give --tokenizer_file, or one to every later command", described)


if __name__ == "__main__":
    cli.run(main)
