"""Build training files from graded samples.

python data_build.py pairs --samples_file log/samples.jsonl --save_file pairs.json
torchrun --nproc_per_node 8 data_build.py process --ckpt_dir out --task GSM8K --samples_file log/samples.jsonl \\
    --log_dir log/rollouts --save_file steps.json
"""

from src.command import cli
from src.construct.from_rows import join, mix, select, split
from src.construct.from_samples import outcome, pairs, prefer, reject
from src.construct.sample_until import attempts
from src.construct.self_made import agree, invent, problems, revise
from src.construct.steps import branch, process
from src.construct.weak_to_strong import contrast, demonstrations, full_weak, report, vote, weak_icl

COMMANDS = {
    "attempts": attempts, "pairs": pairs, "outcome": outcome, "reject": reject, "prefer": prefer, "select": select,
    "split": split, "full_weak": full_weak, "demonstrations": demonstrations, "weak_icl": weak_icl, "report": report,
    "vote": vote, "contrast": contrast, "process": process, "join": join, "branch": branch, "mix": mix,
    "revise": revise, "invent": invent, "problems": problems, "agree": agree,
}

if __name__ == "__main__":
    cli.run(COMMANDS)
