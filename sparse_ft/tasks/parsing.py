"""Dependency parsing with a shallow biaffine head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ..families import unwrapped
from .base import (
    Features,
    Task,
    batches,
    check_length,
    evaluating,
    field,
    for_model,
    head_labels,
    label_ids,
    register,
    unknown_label,
)
from .data import DataError, Examples, source_of, where
from .heads import load_model
from .metrics import attachment
from .tokens import Words

__all__ = ["RELATIONS", "BiaffineParser", "DependencyParsing", "spanning_tree"]

HEAD_FILE = "parser.safetensors"

RELATIONS = (
    *("acl", "advcl", "advmod", "amod", "appos", "aux", "case", "cc", "ccomp", "clf", "compound"),
    *("conj", "cop", "csubj", "dep", "det", "discourse", "dislocated", "expl", "fixed", "flat"),
    *("goeswith", "iobj", "list", "mark", "nmod", "nsubj", "nummod", "obj", "obl", "orphan"),
    *("parataxis", "punct", "reparandum", "root", "vocative", "xcomp"),
)
"""The universal relations: what a parser tells apart, seen in training or not."""


class Parse(NamedTuple):
    """What a parser returns.

    Attributes:
        loss: fp32 [], cross-entropy of heads plus that of relations; None without them.
        arcs: float [batch, words, words + 1], a score for each head of each word; 0 is the root.
        words: float [batch, words + 1, hidden], the root first.
    """

    loss: Tensor | None
    arcs: Tensor
    words: Tensor


class BiaffineParser(nn.Module):
    """A pretrained encoder under a shallow biaffine head (Glavaš and Vulić, EACL 2021).

    A word x is the mean of its pieces' last states, the root the state of the first piece. Heads
    and relations are scored on them directly, without the perceptrons of Dozat and Manning (2017)::

        arc(d, h)   = x_d·U·x_h + u·x_h
        rel(d, h)_r = x_d·U_r·x_h + v_r·[x_d; x_h] + b_r

    The encoder bears the name that it has in transformers' models (`bert`, `roberta`, …), so
    parameters have the same names, and an SFT learnt under another head composes here.

    Args:
        encoder: A model of transformers, as `AutoModel` gives it.
        relations: Number of relations.
    """

    def __init__(self, encoder: nn.Module, relations: int) -> None:
        super().__init__()
        config: Any = encoder.config
        hidden = int(config.hidden_size)
        self.config = config
        self.base_model_prefix = getattr(encoder, "base_model_prefix", "") or "encoder"
        setattr(self, self.base_model_prefix, encoder)
        self.dropout = nn.Dropout(getattr(config, "hidden_dropout_prob", 0.1))
        # Last states are about 1 in size, so that scores are too.
        self.arc_weight = nn.Parameter(torch.randn(hidden, hidden) / hidden)
        self.arc_bias = nn.Parameter(torch.zeros(hidden))
        self.relation_weight = nn.Parameter(torch.randn(relations, hidden, hidden) / hidden)
        self.relation_bias = nn.Linear(2 * hidden, relations)

    def forward(
        self,
        input_ids: Tensor,
        word_index: Tensor,
        heads: Tensor | None = None,
        relations: Tensor | None = None,
        **inputs: Tensor,
    ) -> Parse:
        """Scores the heads of all words.

        Args:
            input_ids: int64 [batch, length].
            word_index: int64 [batch, length], the word of each piece from 1, 0 for the root's, -1
                for the rest.
            heads: int64 [batch, words], gold; -100 is not counted.
            relations: int64 [batch, words], gold; -100 is not counted.
            **inputs: What else the encoder takes.
        """
        encoder: nn.Module = getattr(self, self.base_model_prefix)
        states = self.dropout(encoder(input_ids=input_ids, **inputs).last_hidden_state)
        # With heads, the number of words is known without asking the device.
        count_words = int(word_index.max()) if heads is None else heads.shape[1]
        places = torch.arange(count_words + 1, device=states.device)
        pieces = (word_index[:, None, :] == places[:, None]).to(states.dtype)
        count = pieces.sum(-1, keepdim=True)
        words = (pieces / count.clamp(min=1)) @ states
        dependents = words[:, 1:]
        arcs = (dependents @ self.arc_weight) @ words.mT + (words @ self.arc_bias)[:, None, :]
        # No word is its own head, and none hangs on padding.
        absent = (count.mT == 0) | (places[1:, None] == places)
        arcs = arcs.float().masked_fill(absent, -torch.inf)
        loss = None
        if heads is not None and relations is not None:
            scores = self.relations(words, heads.clamp(min=0))
            loss = _mean_cross_entropy(arcs, heads) + _mean_cross_entropy(scores, relations)
        return Parse(loss, arcs, words)

    def relations(self, words: Tensor, heads: Tensor) -> Tensor:
        """Scores the relations of all words to given heads.

        Args:
            words: float [batch, words + 1, hidden], as `forward` returns them.
            heads: int64 [batch, words], from 0.

        Returns:
            fp32 [batch, words, relations].
        """
        dependents = words[:, 1:]
        governors = words.gather(1, heads[..., None].expand_as(dependents))
        bilinear = torch.einsum("bwi,rij,bwj->bwr", dependents, self.relation_weight, governors)
        linear: Tensor = self.relation_bias(torch.cat((dependents, governors), -1))
        return (bilinear + linear).float()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the encoder as transformers does, and the head beside it; `build` reads both."""
        encoder: Any = getattr(self, self.base_model_prefix)
        encoder.save_pretrained(os.fspath(folder))
        save_file(self._head(), Path(folder) / HEAD_FILE)

    def load_head(self, folder: str | os.PathLike[str]) -> bool:
        """Reads the head that `save_pretrained` wrote, if there is one.

        Raises:
            ValueError: It is the head of other relations, or of another size.
        """
        path = Path(folder) / HEAD_FILE
        if not path.is_file():
            return False
        saved, own = load_file(path), self._head()
        shapes = {name: tuple(value.shape) for name, value in saved.items()}
        if shapes != {name: tuple(value.shape) for name, value in own.items()}:
            raise ValueError(
                f"{path}: the head has other sizes ({shapes}) than this model with "
                f"{len(self.relation_weight)} relations"
            )
        self.load_state_dict(saved, strict=False)
        return True

    def _head(self) -> dict[str, Tensor]:
        prefix = self.base_model_prefix + "."
        return {
            name: value.contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith(prefix)
        }


def _mean_cross_entropy(scores: Tensor, classes: Tensor) -> Tensor:
    """The mean over the classes that count; 0 where truncation has left none, rather than NaN."""
    total = functional.cross_entropy(
        scores.flatten(0, 1), classes.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (classes != -100).sum().clamp(min=1)


@register
@dataclass(frozen=True)
class DependencyParsing(Task):
    """A head and a relation for each word.

    Words that do not fit into max_length have no representation: they are not trained on, and count
    as wrong.

    Attributes:
        metric: "las" or "uas".
        decoder: "mst": the tree of the largest score with one word at the root; "greedy": the best
            head of each word, tree or not.
        punctuation: Whether words with the relation punct are scored, as Universal Dependencies
            does.
        subtypes: Keep the relations' subtypes (nsubj:pass); they differ between languages.
        tokens: The field that holds the words.
        heads: The field that holds the heads, 0 for the root.
        relations: The field that holds the relations.
    """

    name: ClassVar[str] = "parsing"
    auto: ClassVar[str] = "AutoModel"
    words: ClassVar[bool] = True
    plain: ClassVar[str] = "conllu"
    fills: ClassVar[dict[str, int]] = {"word_index": -1, "heads": -100, "relations": -100}

    metric: str = "las"
    decoder: str = "mst"
    punctuation: bool = True
    subtypes: bool = False
    tokens: str = "tokens"
    heads: str = "heads"
    relations: str = "relations"

    def __post_init__(self) -> None:
        if self.metric not in ("las", "uas"):
            raise ValueError(f'metric is {self.metric!r}; parsing has "las" and "uas"')
        if self.decoder not in ("mst", "greedy"):
            raise ValueError(f'decoder is {self.decoder!r}; it must be "mst" or "greedy"')

    def checked(self, examples: Examples) -> Examples:
        rows = []
        for i, row in enumerate(examples):
            names = (self.tokens, self.heads, self.relations)
            words, heads, relations = (field(examples, i, name, list) for name in names)
            if not words or len({len(words), len(heads), len(relations)}) > 1:
                raise DataError(
                    f"{examples.where(i)}: {len(words)} words, {len(heads)} heads and "
                    f"{len(relations)} relations"
                )
            # Of a contraction (1-2) `datasets` gives the whole as well, without a head.
            kept = [w for w, head in enumerate(heads) if head not in (None, "None", "_")]
            words, heads, relations = (
                [column[w] for w in kept] for column in (words, heads, relations)
            )
            if not all(isinstance(text, str) and text for text in (*words, *relations)):
                raise DataError(f"{examples.where(i)}: words and relations must be text")
            try:
                numbers = [int(head) for head in heads]
            except (TypeError, ValueError):
                raise DataError(f"{examples.where(i)}: heads must be numbers") from None
            for word, head in enumerate(numbers, 1):
                if not 0 <= head <= len(words) or head == word:
                    raise DataError(
                        f"{examples.where(i)}: the head of word {word} is {head}; a sentence of "
                        f"{len(words)} words has heads 0 to {len(words)}, and none is its own"
                    )
            if not self.subtypes:
                relations = [relation.partition(":")[0] for relation in relations]
            rows.append({**row, self.tokens: words, self.heads: numbers, self.relations: relations})
        return examples.replaced(rows)

    def labels(self, examples: Sequence[dict[str, Any]]) -> list[str]:
        return sorted({r for e in examples for r in e[self.relations]} | {*RELATIONS})

    def build(
        self,
        base: str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> nn.Module:
        labels = list(label_ids(labels))
        encoder: Any = load_model(base, self.auto, labels=labels, seed=seed, **options)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # of no use here, and random in many bases
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            parser = BiaffineParser(encoder, len(labels))
        parser.load_head(base)
        return parser.to(encoder.dtype)

    def encode(
        self,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        *,
        labels: Sequence[str] | None = None,
    ) -> Features:
        ids = label_ids(labels)
        check_length(tokenizer, max_length)
        reader = Words(tokenizer)
        features = []
        for i, example in enumerate(examples):
            for relation in example[self.relations]:
                if relation not in ids:
                    raise unknown_label(examples, i, relation, labels)
            words, _ = reader.readable(example[self.tokens], where(examples, i))
            encoding = reader.encode(words, max_length)
            index = [-1 if word is None else word + 1 for word in encoding.word_ids()]
            if index[0] != -1:
                raise ValueError(
                    "the tokenizer puts no special piece before a sentence; the parser needs one "
                    "for the root"
                )
            index[0] = 0
            fit = max(index)
            features.append(
                {
                    **for_model(encoding),
                    "word_index": index,
                    "heads": [h if h <= fit else -100 for h in example[self.heads][:fit]],
                    "relations": [
                        ids[r] if h <= fit else -100
                        for h, r in zip(example[self.heads], example[self.relations], strict=True)
                    ][:fit],
                    "example": i,
                }
            )
        if not features:
            raise DataError(f"{source_of(examples)}: holds no sentence")
        return features

    def predict(
        self,
        model: nn.Module,
        features: Features,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        batch_size: int = 32,
    ) -> list[list[list[Any]]]:
        """[head, relation] of each word of each example, [-1, ""] of one that did not fit;
        arguments as of `evaluate`.

        Raises:
            TypeError: The model is no parser.
        """
        parser = unwrapped(model)
        if not isinstance(parser, BiaffineParser):
            raise TypeError(
                f"DependencyParsing.predict: model must be a BiaffineParser, as build gives it, "
                f"got {type(parser).__name__}"
            )
        names = head_labels(model)
        device = next(model.parameters()).device
        predicted: list[list[list[Any]]] = [
            [[-1, ""] for _ in example[self.tokens]] for example in examples
        ]
        with evaluating(model):
            for chosen, batch in batches(features, self.collate(tokenizer), batch_size, device):
                del batch["relations"]
                shape = batch.pop("heads").shape
                found = model(**batch)
                trees = torch.zeros(shape, dtype=torch.int64)
                scores = found.arcs.log_softmax(-1).cpu().numpy()
                for row, i in enumerate(chosen):
                    n = len(features[i]["heads"])
                    trees[row, :n] = torch.tensor(self._tree(scores[row, :n, : n + 1]))
                classes = parser.relations(found.words, trees.to(device)).argmax(-1).tolist()
                for row, i in enumerate(chosen):
                    n, at = len(features[i]["heads"]), features[i]["example"]
                    pairs = zip(trees[row, :n].tolist(), classes[row][:n], strict=True)
                    predicted[at][:n] = [[head, names[c]] for head, c in pairs]
        return predicted

    def gold(self, examples: Sequence[dict[str, Any]]) -> list[list[list[Any]]]:
        return [
            [list(pair) for pair in zip(e[self.heads], e[self.relations], strict=True)]
            for e in examples
        ]

    def score(
        self, predicted: Sequence[Sequence[Sequence[Any]]], examples: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        heads, relations = ([[pair[i] for pair in row] for row in predicted] for i in (0, 1))
        gold = [example[self.relations] for example in examples]
        counted = [
            [self.punctuation or relation.partition(":")[0] != "punct" for relation in row]
            for row in gold
        ]
        scored = attachment(heads, relations, [e[self.heads] for e in examples], gold, counted)
        return {**scored, "n": float(sum(map(sum, counted)))}

    def _tree(self, scores: np.ndarray) -> list[int]:
        if self.decoder == "greedy":
            return [int(head) for head in scores.argmax(1)]
        return spanning_tree(scores)


def spanning_tree(scores: np.ndarray) -> list[int]:
    """The dependency tree of the largest total score with exactly one word at the root.

    Args:
        scores: float [n, n + 1], of the head h (0 is the root) of word d + 1; -inf where it may not
            be, finite for the root.

    Returns:
        The head of each word.

    Raises:
        ValueError: A score is NaN, or one of the root is not finite.

    Source: Chu and Liu (1965), Edmonds (1967). One word at the root: each arc from the root costs
    more than all other arcs can win, so a tree with fewer of them is always better.
    """
    n = len(scores)
    if np.isnan(scores).any() or not np.isfinite(scores[:, 0]).all():
        raise ValueError(
            "spanning_tree: the scores hold NaN, or infinity for the root; the training has "
            "diverged, or the weights do not fit this model"
        )
    square = np.full((n + 1, n + 1), -np.inf)
    square[1:] = scores
    np.fill_diagonal(square, -np.inf)
    finite = square[np.isfinite(square)]
    square[1:, 0] -= 1.0 + n * (finite.max() - finite.min())
    return [int(head) for head in _arborescence(square)[1:]]


def _arborescence(scores: np.ndarray) -> np.ndarray:
    """The heads of the best tree from node 0; scores [m, m] of (dependent, head)."""
    heads: np.ndarray = scores.argmax(1)
    heads[0] = 0
    cycle = _cycle(heads)
    if not cycle.any():
        return heads
    inside, outside = np.flatnonzero(cycle), np.flatnonzero(~cycle)
    m = len(outside)
    # The cycle becomes one node, m. An arc into it replaces the arc of the word that it enters at.
    into = scores[np.ix_(inside, outside)] - scores[inside, heads[inside]][:, None]
    out = scores[np.ix_(outside, inside)]
    smaller = np.full((m + 1, m + 1), -np.inf)
    smaller[:m, :m] = scores[np.ix_(outside, outside)]
    smaller[m, :m], smaller[:m, m] = into.max(0), out.max(1)
    found = _arborescence(smaller)
    heads[outside] = np.where(
        found[:m] == m, inside[out.argmax(1)], outside[np.minimum(found[:m], m - 1)]
    )
    heads[inside[into[:, found[m]].argmax()]] = outside[found[m]]
    return heads


def _cycle(heads: np.ndarray) -> np.ndarray:
    """Which nodes lie on one cycle of the heads, bool [m]; none if they are a tree."""
    reached = np.zeros(len(heads), dtype=bool)
    reached[0] = True
    for start in range(len(heads)):
        path, node = [], start
        while not reached[node]:
            reached[node] = True
            path.append(node)
            node = int(heads[node])
        if node in path:
            on = np.zeros(len(heads), dtype=bool)
            on[path[path.index(node) :]] = True
            return on
    return np.zeros(len(heads), dtype=bool)
