"""What may stand in the metadata of an SFT: every field, its type and its limits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .tiles import Layout

__all__ = ["META_FIELDS", "TEXT_FIELDS", "SFTError", "check_name", "check_text", "checked_meta"]

TEXT_FIELDS = ("role", "lang", "task", "license")
BASE_FIELDS = ("id", "revision", "arch", "files", "digest_f32", "digest_bf16")
FILE_FIELDS = ("name", "sha256")
TRAINED_ON_FIELDS = ("id", "alpha")
_PER_TENSOR = ("aliases", "dtypes", "dense_roles")
META_FIELDS = (
    *("kind", "base", "trained_on", *TEXT_FIELDS, "recipe", "value_loss"),
    *_PER_TENSOR,
)
MAX_DEPTH = 8
MAX_LIST = 1 << 16
MAX_TENSORS = 1 << 18
MAX_TEXT = 4096
MAX_NAME = 512
_HEX16, _HEX64 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
_LANGUAGE = re.compile(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*")


class SFTError(ValueError):
    """A sparse fine-tuning is malformed, or does not fit the model it was given."""


def checked_meta(meta: Mapping[str, Any], layout: Layout, heads: Iterable[str]) -> dict[str, Any]:
    """The metadata as plain JSON values, every field checked.

    Raises:
        SFTError: It begins with the field.
    """
    head_names = set(heads)
    for name in (*layout.names, *head_names):
        check_name("parameter name", name)
    for name in layout.names:
        if name in head_names:
            raise SFTError(f"{name!r} is both among the sparse tensors and among the heads")
    plain: dict[str, Any] = {}
    for key, value in meta.items():
        if key not in META_FIELDS:
            raise SFTError(
                f"metadata: there is no field {key!r}; there are {', '.join(META_FIELDS)}"
            )
        most = MAX_TENSORS if key in _PER_TENSOR else MAX_LIST
        if (item := plain_json(key, value, most=most)) not in (None, "", [], {}):
            plain[key] = item
    _one_of(plain, "kind", ("diff", "replace"))
    _one_of(plain, "value_loss", ("none", "bf16", "f16", "ternary"))
    for key in TEXT_FIELDS:
        if key in plain:
            check_text(key, plain[key])
    if "lang" in plain and not _LANGUAGE.fullmatch(plain["lang"]):
        raise SFTError(
            f"lang: {plain['lang']!r} is no language tag (BCP 47), such as sw or zh-Hans"
        )
    if "recipe" in plain:
        _mapping("recipe", plain["recipe"])
    if "base" in plain:
        _check_base_field(plain["base"])
    if "trained_on" in plain:
        for i, item in enumerate(_list("trained_on", plain["trained_on"])):
            at = f"trained_on[{i}]"
            _keys(at, item, TRAINED_ON_FIELDS)
            _hex(f"{at}.id", item["id"], _HEX64, 64)
            if type(item["alpha"]) not in (int, float):
                raise SFTError(f"{at}.alpha: must be a finite number, found {item['alpha']!r}")
            # Numbers that are equal are written alike: 1 as 1.0, -0.0 as 0.0.
            item["alpha"] = float(item["alpha"]) + 0.0
    _check_per_tensor(plain, layout, head_names)
    return plain


def _check_per_tensor(plain: dict[str, Any], layout: Layout, heads: set[str]) -> None:
    for name, value in _mapping("dtypes", plain.get("dtypes", {})).items():
        if name in layout and value not in ("F32", "BF16", "F16"):
            raise SFTError(f"dtypes: {name!r}: must be F32, BF16 or F16, found {value!r}")
    if "dtypes" in plain:
        plain["dtypes"] = {n: d for n, d in plain["dtypes"].items() if n in layout}
    for name, value in _mapping("dense_roles", plain.get("dense_roles", {})).items():
        if name not in heads:
            raise SFTError(f"dense_roles: there is no head {name!r}")
        if value not in ("head", "param"):
            raise SFTError(f'dense_roles: {name!r}: must be "head" or "param", found {value!r}')
    taken = {*layout.names, *heads}
    for name, group in _mapping("aliases", plain.get("aliases", {})).items():
        if name not in layout:
            raise SFTError(f"aliases: there is no sparse tensor {name!r}")
        for alias in _list(f"aliases of {name!r}", group):
            check_name(f"aliases of {name!r}", alias)
            if alias in taken:
                raise SFTError(f"aliases of {name!r}: the name {alias!r} is taken already")
            taken.add(alias)


def _check_base_field(base: Any) -> None:
    for key, value in _mapping("base", base).items():
        if key not in BASE_FIELDS:
            raise SFTError(f"base: there is no field {key!r}; there are {', '.join(BASE_FIELDS)}")
        if key.startswith("digest"):
            _hex(f"base.{key}", value, _HEX16, 16)
        elif key != "files":
            check_text(f"base.{key}", value)
    for i, item in enumerate(_list("base.files", base.get("files", []))):
        _keys(f"base.files[{i}]", item, FILE_FIELDS)
        check_text(f"base.files[{i}].name", item["name"])
        _hex(f"base.files[{i}].sha256", item["sha256"], _HEX64, 64)


def plain_json(at: str, value: Any, depth: int = 1, most: int = MAX_LIST) -> Any:
    """A value as dict, list, str, int, float, bool or None, within limits of depth and size.

    At most `most` items are taken, at most MAX_LIST below them.

    Raises:
        SFTError: It begins with the place.
    """
    if depth > MAX_DEPTH:
        raise SFTError(f"{at}: nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(at, value)
    if isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise SFTError(f"{at}: an integer beyond 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SFTError(f"{at}: must be a finite number, found {value}")
        return float(value)
    if isinstance(value, Mapping | list | tuple) and len(value) > most:
        raise SFTError(f"{at}: {len(value):,} items; at most {most:,}")
    if isinstance(value, Mapping):
        for key in value:
            check_text(f"{at}: a key", key, MAX_NAME)
        return {key: plain_json(f"{at}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(f"{at}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise SFTError(f"{at}: holds a {type(value).__name__}; text, numbers, lists and mappings work")


def check_name(at: str, name: Any) -> str:
    """A tensor's name: 1 to 512 printable characters."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise SFTError(f"{at}: must be 1 to {MAX_NAME} printable characters, found {short(name)}")
    return name


def check_text(at: str, value: Any, limit: int = MAX_TEXT) -> str:
    """A piece of text: at most `limit` printable characters, and none that would act on a
    terminal."""
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise SFTError(
            f"{at}: must be text of at most {limit} printable characters, found {short(value)}"
        )
    return value


def short(value: Any) -> str:
    said = ascii(value[:200] if isinstance(value, str) else value)
    return said if len(said) <= 80 else f"{said[:77]}…"


def _mapping(at: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SFTError(f"{at}: must be a mapping, found {short(value)}")
    return value


def _list(at: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SFTError(f"{at}: must be a list, found {short(value)}")
    return value


def _keys(at: str, value: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise SFTError(f"{at}: must have the fields {', '.join(keys)}, found {short(value)}")


def _hex(at: str, value: Any, pattern: re.Pattern[str], digits: int) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise SFTError(f"{at}: must be {digits} hex digits (lower case), found {short(value)}")


def _one_of(plain: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    if key in plain and plain[key] not in allowed:
        raise SFTError(f"{key}: must be one of {', '.join(allowed)}, found {short(plain[key])}")
