"""Time of whole training runs with one head, against transformers' Trainer and TRL's SFTTrainer.

    python benchmarks/trainers.py

All three train the same model on documents with HumanEval's lengths, with batch size 8, the same optimiser
and dtype, and a loss on responses only. The other two trainers pad shuffled batches, which is their default;
this framework groups documents by length. On a CPU, the model has a third of SmolLM2-135M's layers and
vocabulary, so that the unembedding has the same share of the work; on a GPU, it has the whole shape and
computes in bfloat16. The loss of TRL computes the logits in chunks. `make bench` installs TRL from
benchmarks/requirements.txt.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpointing import Quiet, Unvalidated
from harness import GPU, Row, autocast, device, in_turns, main, ratio_row, row
from humaneval_lengths import humaneval_tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from weighted_mtp_core.api import Batch, BuildContext
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.data.batches import StepBatches, collate
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import CheckpointTable, DataTable, LossTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.loop import train
from weighted_mtp_core.training.weighting_inputs import Weighting

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform

PACKAGES = Path(__file__).parents[1] / ".venv" / "bench-packages"
BATCH = 8
Record = dict[str, list[int]]


def small_model(*, quick: bool) -> LlamaForCausalLM:
    """Return a model with SmolLM2's proportions and random weights."""
    torch.manual_seed(0)
    full = (576, 30, 49152) if GPU in os.environ else (576, 10, 16384)
    width, layers, vocabulary = (32, 2, 512) if quick else full
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if quick else 9,
        num_key_value_heads=1 if quick else 3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with device():
        return LlamaForCausalLM(config)


def records(tokens: TokenSet) -> list[Record]:
    """Return the documents in the format of the other trainers: ids, and labels that are -100 on prompts."""
    found = []
    for d, prompt in enumerate(tokens.prompt_D.tolist()):
        ids = tokens.ids_N[tokens.start_D1[d] : tokens.start_D1[d + 1]].tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def padded(batch: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Pad a batch to its longest document, like the collators of transformers."""
    width = max(len(each["input_ids"]) for each in batch)

    def pad(key: str, filler: int) -> Tensor:
        rows = [[*each[key], *[filler] * (width - len(each[key]))] for each in batch]
        return torch.tensor(rows)

    mask = [[1] * len(each["input_ids"]) + [0] * (width - len(each["input_ids"])) for each in batch]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def common_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of the other two trainers: the framework's optimiser, no logs, no saved files."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "learning_rate": 3e-4,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": GPU not in os.environ,
        "bf16": GPU in os.environ,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }


def transformers_trainer(model: LlamaForCausalLM, data: list[Record], folder: Path) -> Trainer:
    """Return the Trainer of transformers."""
    return Trainer(
        model=model,
        args=TrainingArguments(**common_arguments(folder)),
        train_dataset=data,
        data_collator=padded,
    )


def sft_trainer(model: LlamaForCausalLM, data: list[Record], folder: Path) -> Trainer:
    """Return the SFTTrainer of TRL for tokenised data."""
    sys.path.append(str(PACKAGES))
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    trainer: Trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **common_arguments(folder), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    return trainer


PEERS: dict[str, Callable[[LlamaForCausalLM, list[Record], Path], Trainer]] = {
    "Trainer": transformers_trainer,
    "SFTTrainer": sft_trainer,
}


class Unsaved(Unvalidated):
    """Stage 2 without validations and without files, because the other trainers have neither."""

    def save_best(self) -> None:
        """Write nothing."""

    def load_best(self) -> None:
        """Keep the state after the last step."""


def our_learner(
    model: LlamaForCausalLM, folder: Path, *, steps: int, pairs_per_step: Sequence[float]
) -> Unsaved:
    """Return the learner of stage 2 with one head and uniform weights."""
    return Unsaved(
        policy=make_policy(model, n_future=1, head_kind="parallel"),
        weighting=Weighting(
            strategy=build_uniform(UniformOptions(), BuildContext(seed=0, storage=folder)),
            needs=frozenset(),
            critic=None,
            label="benchmark",
        ),
        loss=LossTable(),
        steps=steps,
        pairs_per_step=pairs_per_step,
        accumulation=1,
        autocast=autocast,
        validation=list,
        best=folder / "best_model.pt",
    )


def train_ours(model: LlamaForCausalLM, batches: StepBatches, *, steps: int) -> None:
    """Train for an epoch with the framework's loop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with NoCheckpoints(folder=folder, table=CheckpointTable(every=0), log=print) as checkpoints:
            train(
                our_learner(
                    copy.deepcopy(model),
                    folder,
                    steps=steps,
                    pairs_per_step=batches.pairs_per_step(n_future=1),
                ),
                TrainTable(steps=steps, batch_size=BATCH),
                batch_of=batches,
                reporter=Quiet(),
                checkpoints=checkpoints,
            )


class NoCheckpoints(Checkpoints):
    """Checkpoints that are never written, because the other trainers write none either."""

    def due(self, step: int, steps: int) -> bool:
        """Return False for every step."""
        del step, steps
        return False


def train_peer(name: str, model: LlamaForCausalLM, data: list[Record]) -> None:
    """Train for an epoch with the trainer called `name`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = PEERS[name](copy.deepcopy(model), data, Path(folder))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def loss_gap(model: LlamaForCausalLM, tokens: TokenSet, data: list[Record]) -> float:
    """Return the largest relative difference between the other trainers' loss of the first batch and ours."""
    batch: Batch = collate(tokens, range(BATCH), device=device())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [float(batch.response_BT.sum())]
        learner = our_learner(copy.deepcopy(model), folder, steps=1, pairs_per_step=pairs)
        ours = float(learner.learn(batch, step=0).loss)
        gaps = []
        for peer in PEERS.values():
            trainer = peer(copy.deepcopy(model), data, folder)
            inputs = trainer.data_collator([dict(each) for each in data[:BATCH]])
            with autocast():
                loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))  # noqa: SLF001
            gaps.append(abs(float(loss) - ours) / ours)
    return max(gaps)


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    limit, rounds = (16, 2) if args.quick else (48, 2)
    model = small_model(quick=args.quick)
    tokens = humaneval_tokens(model.config.vocab_size, limit=limit)
    data = records(tokens)
    batches = StepBatches(tokens, DataTable(use="benchmark"), batch_size=BATCH, seed=0, device=device())
    steps = -(-limit // BATCH)
    gap = loss_gap(model, tokens, data)
    variants: dict[str, Callable[[], object]] = {"ours": partial(train_ours, model, batches, steps=steps)}
    variants |= {name: partial(train_peer, name, model, data) for name in PEERS}
    times = in_turns(variants, rounds=rounds, warmup=0)
    real = int(tokens.start_D1[-1])
    better = min(PEERS, key=lambda name: sum(times[name].cpu))
    return [
        row("trainers: losses of one batch, largest relative gap", [gap], limit="<= 1e-5", unit=""),
        ratio_row(
            f"trainers: real tokens a second over the better of the two ({better})",
            times[better],
            times["ours"],
            limit=">= 1.6",
        ),
        ratio_row("trainers: over transformers' Trainer", times["Trainer"], times["ours"]),
        ratio_row("trainers: over TRL's SFTTrainer", times["SFTTrainer"], times["ours"]),
        row(
            "trainers: ours",
            [real / seconds for seconds in times["ours"].cpu],
            unit="real tokens/s",
            note=f"{limit} documents, {real} tokens",
        ),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
