"""The C header against the ctypes table: names, results, arguments, structures, constants."""

import ctypes
import re
from pathlib import Path

import pytest

from sparse_ft_kernels import TILE, contract, native, reference
from sparse_ft_kernels.tile_table import DTYPE_CODES

HEADER = (Path(__file__).parents[1] / "csrc" / "sparse_ft.h").read_text()
CODE = re.sub(r"/\*.*?\*/", " ", HEADER, flags=re.S)

SCALARS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def declared() -> dict[str, tuple[type, tuple[type, ...]]]:
    out = {}
    for result, name, arguments in re.findall(
        r"SFT_API\s+([\w\s]+?[\s*]+)(\w+)\s*\(([^)]*)\)\s*;", CODE
    ):
        parts = [a.strip() for a in arguments.split(",")]
        out[name] = (
            ctypes.c_char_p if "char" in result else SCALARS[result.strip()],
            tuple(_argument(a) for a in parts if a != "void"),
        )
    return out


def _argument(text: str) -> type:
    if "sft_tiles" in text:
        return ctypes.POINTER(native.Tiles)
    if "char" in text:
        return ctypes.c_char_p
    if "*" in text:
        return ctypes.c_void_p
    return SCALARS[text.rsplit(maxsplit=1)[0].replace("const ", "")]


def test_every_function_is_in_both():
    assert declared().keys() == native.SIGNATURES.keys()
    assert len(declared()) > 20


@pytest.mark.parametrize("name", native.SIGNATURES)
def test_signature(name):
    assert native.SIGNATURES[name] == declared()[name]


def test_structure():
    body = re.search(r"typedef struct \{(.*?)\} sft_tiles;", CODE, re.S).group(1)
    fields = [
        (name, ctypes.c_void_p if "*" in kind else SCALARS[kind.strip()])
        for kind, name in re.findall(r"((?:const )?\w+ \*?)(\w+);", body)
    ]
    assert fields == native.Tiles._fields_


def test_constants():
    def number(name: str) -> int:
        return int(re.search(rf"{name}\s*=?\s*(\d+)", CODE).group(1))

    assert number("#define SFT_TILE") == TILE
    assert number("#define SFT_HASH_PIECE") == contract.HASH_PIECE
    assert number("#define SFT_SUM_RUN") == native.SUM_RUN == reference.SUM_RUN
    assert number("#define SFT_ABI_VERSION") == native.ABI_VERSION
    assert [number(n) for n in ("SFT_MASTER_NONE", "SFT_MASTER_F32", "SFT_MASTER_SPLIT")] == [
        *(native.MASTER_NONE, native.MASTER_F32, native.MASTER_SPLIT)
    ]
    assert [number(n) for n in ("SFT_F32", "SFT_BF16", "SFT_F16")] == list(DTYPE_CODES.values())
    assert [
        number(n)
        for n in ("SFT_OK", "SFT_BAD_ARGUMENT", "SFT_NONFINITE", "SFT_TOO_FEW", "SFT_WORKSPACE")
    ] == [native.OK, native.BAD_ARGUMENT, native.NONFINITE, native.TOO_FEW, native.WORKSPACE]


def test_the_library_answers():
    library, reason = native.load()
    if library is None:
        pytest.skip(reason)
    assert native.isa() in ("avx512", "avx2", "portable")
    assert library.sft_build_id()
    assert len({library.sft_status_string(s) for s in range(6)}) == 6
    with pytest.raises(ValueError, match="is not available here"):
        native.set_isa("sse9")
