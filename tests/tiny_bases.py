"""Tiny models of random values with their tokenizers, and tiny data, for tests of whole runs."""

import json
from pathlib import Path

import torch

WORDS = [
    *("the", "a", "dog", "cat", "bird", "sees", "hears", "likes", "old", "small", "red", "green"),
    *("house", "tree", "river", "Anna", "Omar", "Lima", "Oslo", "in", "near", "and", "not", "."),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer_of_words(folder: Path) -> None:
    """A tokenizer that knows each of WORDS as one piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", eos_token="[SEP]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def bert_folder(folder: Path) -> Path:
    """A BERT of two layers and 32 dimensions, with a masked-language head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertForMaskedLM(config).save_pretrained(folder)
    tokenizer_of_words(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    """A decoder of two layers and 32 dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of_words(folder)
    return folder


def sentences(n: int, seed: int) -> list[list[str]]:
    """Sentences of three to eight words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    return [[WORDS[draw(len(WORDS))] for _ in range(3 + draw(6))] for _ in range(n)]


def write_data(folder: Path) -> None:
    """One small file of each kind, whose labels follow from the words: text.txt, and train.x and
    test.x with the suffixes conll, conllu, csv, jsonl (pairs) and json (SQuAD)."""
    (folder / "text.txt").write_text("\n".join(map(" ".join, sentences(120, 0))) + "\n", "utf-8")
    for split, n, seed in (("train", 40, 1), ("test", 12, 2)):
        some = sentences(n, seed)
        places, people = ("Lima", "Oslo"), ("Anna", "Omar")
        tags = [
            ["B-LOC" if w in places else "B-PER" if w in people else "O" for w in words]
            for words in some
        ]
        conll = (
            "\n".join(map(" ".join, zip(*pair, strict=True)))
            for pair in zip(some, tags, strict=True)
        )
        (folder / f"{split}.conll").write_text("\n\n".join(conll) + "\n", "utf-8")
        conllu = (
            "\n".join(
                "\t".join([str(i), w, "_", "NOUN" if w[0].isupper() else "X", *"__",
                           str(i - 1), "root" if i == 1 else "dep", *"__"])
                for i, w in enumerate(words, 1)
            )
            for words in some
        )  # fmt: skip
        (folder / f"{split}.conllu").write_text("\n\n".join(conllu) + "\n\n", "utf-8")
        rows = (f"{' '.join(words)},{'yes' if words[0] > 'c' else 'no'}" for words in some)
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
        pairs = [
            {
                "premise": " ".join(words),
                "hypothesis": " ".join(words[:2]),
                "label": ["entailment", "neutral"][words[0] > "c"],
            }
            for words in some
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", "utf-8")
        paragraphs = [
            {
                "context": " ".join(words),
                "qas": [
                    {
                        "id": f"{split}{i}",
                        "question": "the old dog",
                        "answers": [{"text": words[1], "answer_start": len(words[0]) + 1}],
                    }
                ],
            }
            for i, words in enumerate(some)
        ]
        squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(squad), "utf-8")
