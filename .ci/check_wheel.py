"""Checks a wheel as its user meets it: `python .ci/check_wheel.py WHEEL` at the repository's top.

Its tag must fit its content; installed into an environment that has the dependencies but no
checkout, it must work from any folder, and from the top of a checkout too, where the folder
sparse_ft/ hides the installed package and the plain folder kernels/ lies on the path.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

CALL = """
import sparse_ft, sparse_ft_kernels, torch
from pathlib import Path
assert Path(sparse_ft_kernels.__file__).is_relative_to({site!r}), sparse_ft_kernels.__file__
weights = [torch.tensor([3.0, -5.0, 1.0, 4.0])]
idx, ptr, info = sparse_ft_kernels.select_topk(weights, k=2)
assert idx.tolist() == [1, 3] and ptr.tolist() == [0, 2], (idx, ptr)
rows = sparse_ft_kernels.explain("cpu")
chosen = {{backend for op, backend, state in rows if op == "select_topk" and state == "chosen"}}
assert chosen == {{{backend!r}}}, rows
print("ok:", sparse_ft.__file__, sparse_ft_kernels.__file__, *chosen)
"""


def main(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.startswith("sparse_ft_kernels/_lib/libsparse_ft")]
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none"), wheel.name
    assert (platform == "any") == (not libraries), (wheel.name, libraries)
    tops = {name.split("/")[0] for name in names}
    assert all(top.startswith("sparse_ft") for top in tops), tops

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "venv"
        venv.create(home, with_pip=False)
        python_here = home / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([str(python_here), "-c", ask], text=True).strip()
        # The dependencies of this environment, without its own (editable) installation.
        Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python_here), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--ignore-installed", str(wheel.resolve())], check=True)
        backend = "cpu" if libraries else "reference"
        call = [str(python_here), "-c", CALL.format(site=site, backend=backend)]
        for folder in (Path(scratch), Path.cwd()):
            subprocess.run(call, cwd=folder, check=True)
        subprocess.run([str(home / "bin" / "sparse-ft"), "--version"], cwd=scratch, check=True)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
