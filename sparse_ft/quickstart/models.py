"""The two models of the quickstart: one encoder, a masked-language head or a classifier on it.

Both name the encoder `encoder`, so an SFT learnt under one head composes under the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

POOLED_SCALE = 10.0
"""Factor on the mean-pooled vectors: an encoder of sentence vectors packs them into a narrow cone,
and one learning rate then serves classifier and encoder."""


class MaskedLanguageModel(nn.Module):
    """An encoder with a head that predicts masked pieces.

    The output matrix is a frozen copy of the input embeddings of the pieces that can be predicted,
    as LT-SFT prescribes for language training (input embeddings train, output embeddings do not).

    Args:
        encoder: a Hugging Face encoder.
        predicted: int64 [classes], input ids that the head tells apart.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: nn.Module, predicted: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        embeddings: Tensor = encoder.get_input_embeddings().weight  # type: ignore[operator]
        hidden = embeddings.shape[1]
        self.dense = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.decoder = nn.Linear(hidden, len(predicted))
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = nn.Parameter(
            embeddings.detach()[predicted].clone(), requires_grad=False
        )

    def forward(self, ids: Tensor, attention: Tensor, masked: Tensor) -> Tensor:
        """Score the pieces at the masked positions.

        Args:
            ids: int64 [batch, length], masked input.
            attention: int64 [batch, length], 1 for pieces and 0 for padding.
            masked: bool [batch, length], positions to predict.

        Returns:
            Logits [masked positions, classes].
        """
        states = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
        hidden = self.norm(functional.gelu(self.dense(states[masked])))
        scores: Tensor = self.decoder(hidden)
        return scores

    def head_state(self) -> dict[str, Tensor]:
        """Copies of the head's tensors, the encoder left out."""
        return {
            name: value.detach().clone()
            for name, value in self.state_dict().items()
            if not name.startswith("encoder.")
        }


class Classifier(nn.Module):
    """An encoder with a linear classifier on the mean of its last states.

    Args:
        encoder: a Hugging Face encoder.
        hidden: its hidden size.
        classes: number of labels.
    """

    base_model_prefix = "encoder"

    def __init__(self, encoder: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Score the labels.

        Args:
            ids: int64 [batch, length].
            attention: int64 [batch, length], 1 for pieces and 0 for padding.

        Returns:
            Logits [batch, classes].
        """
        states = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
        weight = attention[..., None].float()
        mean = (states.float() * weight).sum(1) / weight.sum(1)
        scores: Tensor = self.classifier(mean * POOLED_SCALE)
        return scores


def pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to one length; returns ids and attention mask, int64 [rows, length]."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    attention = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attention[i, : len(row)] = 1
    return ids, attention
