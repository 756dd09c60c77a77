"""A BERT of two small layers, from its configuration, and sentences of which each task asks something else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

import metamask_ext as mm

WORDS, LENGTH = 50, 8


def bert(tasks: tuple[str, ...] = ()) -> nn.Module:
    """Masked in all its linear layers; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(
            BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=2, **sizes, **dropout)
        )
        mm.convert(model)
        for task in tasks:
            mm.add_task(model, task)
        return model


class Sentences(Dataset):
    """Random words, and a label that a task asks for: the first word is in the upper half, or the last one is.

    Args:
        count: of sentences.
        tasks: the slot of each sentence's task, in turn.
        named: whether a sample has its task.
    """

    def __init__(self, count: int, tasks: tuple[int, ...] = (0,), named: bool = False):
        self.words = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(6))
        self.tasks = torch.tensor(tasks * (count // len(tasks)))
        self.named = named

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words, task = self.words[index], self.tasks[index]
        sample = {"input_ids": words, "labels": (words[0 if task % 2 == 0 else -1] >= WORDS // 2).long()}
        return {**sample, "task": task} if self.named else sample
