"""What the ranks of the verifiers' tests compute; it also runs in the test's own process, on one rank."""

import torch
from torch import Tensor

from src import load, parallel
from src.command.config import OptimizerFlags
from src.data.batch import BatchSampler
from src.data.examples import StepLabels
from src.runlog import RunLog
from src.training.reward_model import label_dataset
from src.training.trainer import Trainer
from tests.training.workers import local_weights, lora_of

ROWS = {
    "outcome": [
        StepLabels("1+1=", ["2"], [1.0]),
        StepLabels("a", ["bcdefgh\n\n0123"], [0.0]),
        StepLabels("", ["7"], [1.0]),
        StepLabels("which is it: 3 or 4", ["gd"], [0.0]),
        StepLabels("0-0=", ["0 0 0\n\n#### 0"], [1.0]),
        StepLabels("9-8=", ["#### 2"], [0.0]),
    ],
    "process": [
        StepLabels("1+1=", ["1+1=2", "#### 2"], [1.0, 1.0]),
        StepLabels("a", ["b", "cdefgh", "0", "#### 3"], [1.0, 0.25, None, 0.0]),
        StepLabels("", ["7"], [1.0]),
        StepLabels("which is it: 3 or 4", ["abc\n\nd"], [0.0]),  # an outcome among judged steps
        StepLabels("0-0=", ["0 0 0", "1"], [1.0, 0.0]),
        StepLabels("9-8=", ["1", "2", "3"], [None, None, 0.0]),
    ],
}


def verifier_cases(folder: str, log_dir: str, cases: list[dict[str, object]]) -> dict[str, dict[str, Tensor]]:
    """verifier_epochs() of every case, by its place in the list."""
    return {str(index): verifier_epochs(folder, log_dir, **case) for index, case in enumerate(cases)}


def verifier_epochs(
    folder: str,
    log_dir: str,
    objective: str,
    max_batch_size: int = 8,
    accumulation_steps: int = 1,
    packing: bool = False,
    lora_rank: int = -1,
    label_tokens: str = "all",
) -> dict[str, Tensor]:
    """This tensor-parallel rank's weights after two steps on ROWS, the losses, the report on ROWS, and how many forward
    passes of this rank it took."""
    lora = lora_of(lora_rank)
    model = load.load_verifier(folder, trained=load.Trained(lora))
    options = {"max_seq_len": 64, "source": "ROWS", "label_tokens": label_tokens, "balance": True}
    data, kind = label_dataset(ROWS[objective], load.load_tokenizer(folder), **options)
    trainer = Trainer(model, RunLog(log_dir, {}), OptimizerFlags(lr=1e-4, weight_decay=0.1), total_steps=2)
    batching = BatchSampler(
        max_batch_size=max_batch_size,
        accumulation_steps=accumulation_steps,
        seed=3,
        rank=parallel.data_parallel_rank(),
        ranks=parallel.data_parallel_size(),
    )
    model.train()
    losses = []
    for _, _, batches in batching.steps(data, packing=packing, epochs=2):
        n_labels = parallel.sum_over_data_parallel(kind.count(batches))
        for batch in batches:
            trainer.backward(kind.loss(model, batch) / n_labels, last=batch is batches[-1])
        losses.append(trainer.step().loss)
    passes: list[object] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs))
    report = kind.evaluate(model, data, max_batch_size)
    said = {"losses": losses, "report": report, "passes": float(len(passes))}
    return local_weights(model) | {name: torch.tensor(values) for name, values in said.items()}
