"""SFTs as the authors of LT-SFT published them: files in their format, with their names, on the
models that they are used with.

Published are language SFTs of October 2021, without `abs`; later ones, whose `abs` has the
language-model head without its output matrix; and task SFTs, with the task's head. All have every
tensor that was trainable, LayerNorm excepted, also where no entry was selected.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile.torch_files import Zip
from oracles import assert_bits
from tiny_models import tiny
from torch import Tensor, nn

import sparse_ft as sf
from sparse_ft import legacy

pytestmark = pytest.mark.filterwarnings("ignore:.*does not say which base model")

# Tensors of the language-model head that `abs` has. The substring "LayerNorm", by which norms were
# frozen, misses the norm of XLM-R's head.
LM_HEADS = {
    "BERT": {
        "cls.predictions.bias",
        *("cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias"),
    },
    "XLM-R": {
        "lm_head.bias",
        *("lm_head.dense.weight", "lm_head.dense.bias"),
        *("lm_head.layer_norm.weight", "lm_head.layer_norm.bias"),
    },
}
PREFIXES = {"BERT": "bert.", "XLM-R": "roberta."}
# The names that the pickles of published files mention.
GLOBALS = {
    "torch Size",
    "numpy.core.multiarray scalar",
    "numpy dtype",
    "_codecs encode",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "collections OrderedDict",
}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by every name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.detach().clone() for name, parameter in named}


def encoded(dense: Tensor) -> dict:
    """A tensor's entry: gaps between positions in Fortran's order, the first a numpy number."""
    flat = dense.numpy().reshape(-1, order="F")
    place = np.flatnonzero(flat)
    steps = np.diff(place, prepend=0).tolist()
    return {
        "size": dense.shape,
        "index_steps": [np.int64(n) for n in steps[:1]] + steps[1:],
        "values": torch.from_numpy(flat[place].copy()),
    }


def publish(path: Path, differences: dict[str, Tensor], heads: dict[str, Tensor] | None) -> Path:
    """A file as torch 1.9 and numpy 1 wrote it: numpy's old names, no member `byteorder`."""
    content: dict = {"diffs": {name: encoded(dense) for name, dense in differences.items()}}
    if heads is not None:
        content["abs"] = heads
    raw = io.BytesIO()
    torch.save(content, raw)
    members = {}
    with zipfile.ZipFile(raw) as file:
        for name in file.namelist():
            members["archive/" + name.partition("/")[2]] = file.read(name)
    pickled = members["archive/data.pkl"].replace(b"cnumpy._core.", b"cnumpy.core.")
    found = {str(arg) for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
    assert found == GLOBALS
    data = [(name, member) for name, member in members.items() if "/data/" in name]
    path.mkdir(exist_ok=True)
    (path / "pytorch_diff.bin").write_bytes(
        Zip([("archive/data.pkl", pickled), *data, ("archive/version", b"3\n")]).build()
    )
    return path


def difference(model: nn.Module, prefix: str, seed: int) -> dict[str, Tensor]:
    """Of every trainable tensor of the backbone; none in its biases."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix) and "LayerNorm" not in name:
            dense = torch.randn(parameter.shape, generator=generator)
            keep = torch.rand(parameter.shape, generator=generator) < 0.1
            found[name] = dense * keep * (not name.endswith("bias"))
    return found


def with_backbone_of(model: nn.Module, family: str, head: str) -> nn.Module:
    """A model with another head, or with none."""
    other = tiny(family, head)
    values, prefix = parameters(model), PREFIXES[family]
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            value = values.get(name, values.get(prefix + name))
            if value is not None:
                parameter.copy_(value)
    return other


@pytest.mark.parametrize("of_2021", [True, False], ids=["2021", "later"])
@pytest.mark.parametrize("family", PREFIXES)
def test_language_sfts_fit_every_model(family, of_2021, tmp_path):
    base, prefix = tiny(family), PREFIXES[family]
    phi = difference(base, prefix, 1)
    assert prefix + "embeddings.word_embeddings.weight" in phi
    heads = None
    if not of_2021:
        heads = {n: v + 1.0 for n, v in parameters(base).items() if n in LM_HEADS[family]}
        assert heads.keys() == LM_HEADS[family]
    folder = publish(tmp_path / "sft", phi, heads)
    loaded = sf.SparseDelta.load(folder)
    assert set(loaded.layout.names) == phi.keys()
    assert loaded.heads.keys() == (heads or {}).keys()
    # With the base given once, the SFT recognises it in every model that has it.
    known = legacy.read(folder, base=base, lang="sw", role="language")
    known.save(tmp_path / "sft.safetensors")
    known = sf.SparseDelta.load(tmp_path / "sft.safetensors")
    for head in ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "Model"):
        model = with_backbone_of(base, family, head)
        before = parameters(model)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        assert any("position_ids" in n for n in buffers)
        expected = dict(before)
        for name, dense in phi.items():
            own = name if head != "Model" else name.removeprefix(prefix)
            expected[own] = before[own] + dense
        if head == "ForMaskedLM":
            # Tied: the output matrix moves with the input, as in the reference implementation.
            output = {"BERT": "cls.predictions.decoder.weight", "XLM-R": "lm_head.decoder.weight"}
            expected[output[family]] = expected[prefix + "embeddings.word_embeddings.weight"]
        for delta in (loaded, known):
            with sf.compose(model, [delta]):
                for name, value in parameters(model).items():
                    assert_bits(value, expected[name], name)
                for name, buffer in model.named_buffers():
                    assert torch.equal(buffer, buffers[name])
            for name, value in parameters(model).items():
                assert_bits(value, before[name], name)
    if heads:
        with sf.compose(base, [known], heads=[known]):
            found = parameters(base)
            assert all(torch.equal(found[name], head) for name, head in heads.items())


@pytest.mark.parametrize("family", PREFIXES)
def test_another_base_is_refused(family, tmp_path):
    base = tiny(family)
    folder = publish(tmp_path / "sft", difference(base, PREFIXES[family], 1), None)
    known = legacy.read(folder, base=base)
    model = with_backbone_of(base, family, "Model")
    # The base may be given bare, too.
    assert legacy.read(folder, base=model) == known
    with torch.no_grad():
        model.embeddings.word_embeddings.weight *= 1.01
    with pytest.raises(sf.SFTError, match="made for another base model"):
        sf.compose(model, [known])


@pytest.mark.parametrize("family", PREFIXES)
def test_language_and_task_as_the_reference_implementation_adds_them(family, tmp_path):
    base, prefix = tiny(family), PREFIXES[family]
    source = with_backbone_of(base, family, "ForTokenClassification")
    language = difference(base, prefix, 1)
    task = difference(source, prefix, 2)
    classifier = {
        name: torch.randn(value.shape)
        for name, value in parameters(source).items()
        if name.startswith("classifier.")
    }
    deltas = [
        sf.SparseDelta.load(publish(tmp_path / "task", task, classifier)),
        sf.SparseDelta.load(publish(tmp_path / "language", language, None)),
    ]
    before = parameters(source)
    with sf.compose(source, deltas, heads=deltas[0], compat="sequential"):
        for name, value in parameters(source).items():
            if name in classifier:
                assert_bits(value, classifier[name], name)
            else:
                zero = torch.zeros_like(value)
                sum_ = before[name] + task.get(name, zero) + language.get(name, zero)
                assert_bits(value, sum_, name)
    for name, value in parameters(source).items():
        assert_bits(value, before[name], name)


def test_a_pooler_that_the_model_lacks_is_named(tmp_path):
    """BERT's sequence classifier has a pooler in its backbone, and the token classifier none."""
    source = tiny("BERT", "ForSequenceClassification")
    phi = difference(source, "bert.", 3)
    assert "bert.pooler.dense.weight" in phi
    delta = sf.SparseDelta.load(publish(tmp_path / "sft", phi, {}))
    model = with_backbone_of(source, "BERT", "ForTokenClassification")
    before = parameters(model)
    with pytest.raises(sf.SFTError, match=r"no parameter 'bert\.pooler\.dense\.bias'.*\"ignore\""):
        sf.compose(model, [delta])
    with pytest.warns(UserWarning, match="lacks 2 of the SFT's"):
        composition = sf.compose(model, [delta], unused="ignore")
    with composition:
        for name, value in parameters(model).items():
            assert_bits(value, before[name] + phi.get(name, torch.zeros_like(value)), name)


def test_a_buffer_is_no_parameter(tmp_path):
    model = tiny("BERT")
    wrong = {"bert.embeddings.position_ids": torch.ones(1, 3)}
    delta = sf.SparseDelta.load(publish(tmp_path / "sft", wrong, {}))
    with pytest.raises(sf.SFTError, match="position_ids' is a buffer of this model"):
        sf.compose(model, [delta])
