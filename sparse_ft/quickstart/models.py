"""The two models of the quickstart: one encoder, a masked-language head or a classifier on it.

Both name the encoder as models of its family do (`bert`), so an SFT learnt under one head composes
under the other, and under the heads of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .e5 import QuickstartError

POOLED_SCALE = 10.0
"""Factor on the mean-pooled vectors: an encoder of sentence vectors packs them into a narrow cone,
and one learning rate then serves classifier and encoder."""


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of transformers among ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_encoder(name: str) -> nn.Module:
    """A Hugging Face encoder in float32, without a pooler where it has the choice.

    Args:
        name: a name or a folder.

    Raises:
        QuickstartError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModel

    try:
        try:
            encoder = AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
        except TypeError:
            encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise QuickstartError(f"the model {name!r} cannot be loaded: {error}") from error
    for parameter_name, parameter in encoder.named_parameters():
        parameter.requires_grad_("pooler" not in parameter_name)
    return encoder  # type: ignore[no-any-return]


class WithHead(nn.Module):
    """A Hugging Face encoder under the name that its family gives it.

    Args:
        encoder: a Hugging Face encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.base_model_prefix: str = encoder.base_model_prefix  # type: ignore[assignment]
        self.add_module(self.base_model_prefix, encoder)

    @property
    def encoder(self) -> nn.Module:
        """The encoder."""
        return self.get_submodule(self.base_model_prefix)

    def states(self, ids: Tensor, attention: Tensor) -> Tensor:
        """The encoder's last states.

        Args:
            ids: int64 [batch, length].
            attention: int64 [batch, length], 1 for pieces and 0 for padding.

        Returns:
            Float [batch, length, hidden].
        """
        states: Tensor = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
        return states


class MaskedLanguageModel(WithHead):
    """An encoder with a head that predicts masked pieces.

    The output matrix is a frozen copy of the input embeddings of the pieces that can be predicted,
    as LT-SFT prescribes for language training (input embeddings train, output embeddings do not).

    Args:
        encoder: a Hugging Face encoder.
        predicted: int64 [classes], input ids that the head tells apart.
    """

    def __init__(self, encoder: nn.Module, predicted: Tensor) -> None:
        super().__init__(encoder)
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
        hidden = self.norm(functional.gelu(self.dense(self.states(ids, attention)[masked])))
        scores: Tensor = self.decoder(hidden)
        return scores

    def head_state(self) -> dict[str, Tensor]:
        """Copies of the head's tensors, the encoder left out."""
        return {
            name: value.detach().clone()
            for name, value in self.state_dict().items()
            if not name.startswith(self.base_model_prefix + ".")
        }


class Classifier(WithHead):
    """An encoder with a linear classifier on the mean of its last states.

    Args:
        encoder: a Hugging Face encoder.
        classes: number of labels.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__(encoder)
        hidden: int = encoder.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
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
        weight = attention[..., None].float()
        mean = (self.states(ids, attention).float() * weight).sum(1) / weight.sum(1)
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
