"""Download from and upload to the Hub, against a server that speaks its protocol."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

import sparse_ft as sf
from sparse_ft.files import SFTFileError

huggingface_hub = pytest.importorskip("huggingface_hub")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def make(value: float = 1.0, **meta: object) -> sf.SparseDelta:
    layout = sf.Layout.of({"encoder.weight": (300, 400), "norm.bias": (7,)})
    support = sf.Support.from_indices(layout, {"encoder.weight": [5, 99_999], "norm.bias": [6]})
    return sf.SparseDelta(support, torch.tensor([value, -2.0, 3.0]), meta=meta)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that downloading a file and making a commit need."""

    files: dict[tuple[str, str, str], bytes]
    log: list[str]

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.log.append(f"{self.command} {self.path}")
        owner, name, verb, revision, file = self.path.strip("/").split("/", 4)
        repo = f"{owner}/{name}"
        assert verb == "resolve"
        if repo == "me/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        if repo not in {key[0] for key in self.files}:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="no repository")
        if revision not in (*COMMITS, *COMMITS.values()):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
        revision = {commit: branch for branch, commit in COMMITS.items()}.get(revision, revision)
        body = self.files.get((repo, revision, file))
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no file")
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMITS[revision])

    do_HEAD = do_GET

    def do_POST(self):
        self.log.append(f"{self.command} {self.path}")
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            sent = json.loads(raw)
            repo = "/".join(filter(None, (sent.get("organization"), sent["name"])))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{repo}"})
        if self.path == "/api/validate-yaml":
            content = json.loads(raw)["content"]
            fields = yaml.safe_load(content.split("---")[1])
            assert fields["library_name"] == "sparse-ft"
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(raw)["files"]]
            modes = [
                {"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for p in paths
            ]
            return self.answer(200, {"files": modes})
        assert "/commit/" in self.path
        repo = "/".join(self.path.split("/")[3:5])
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.files[repo, "main", value["path"]] = base64.b64decode(value["content"])
        return self.answer(
            200,
            {
                "success": True,
                "commitOid": COMMITS["main"],
                "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMITS['main']}",
            },
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    Hub.log = []
    Hub.files = {
        ("me/sw", "main", "sft.safetensors"): Path(make(1.0).save(folder)).read_bytes(),
        ("me/sw", "v1", "sft.safetensors"): Path(make(0.5).save(folder)).read_bytes(),
        ("me/other", "main", "README.md"): b"# no SFT",
        ("me/damaged", "main", "sft.safetensors"): b"\0" * 100,
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(hub, home, script, offline=False):
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http", "HTTP"))},
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    prelude = (
        "import json, sparse_ft as sf\n"
        "said = {}\n"
        "def refused(source, **options):\n"
        "    try:\n"
        "        sf.SparseDelta.load(source, **options)\n"
        "    except sf.SFTError as error:\n"
        "        return str(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}{script}\nprint(json.dumps(said))"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_download_push_and_the_offline_cache(hub, tmp_path):
    home = tmp_path / "home"
    said = run(
        hub,
        home,
        "said['main'] = sf.SparseDelta.load('me/sw').val.tolist()\n"
        "said['v1'] = sf.SparseDelta.load('me/sw', revision='v1').val.tolist()\n"
        "said['no repository'] = refused('me/absent')\n"
        "said['no revision'] = refused('me/sw', revision='v9')\n"
        "said['no SFT'] = refused('me/other')\n"
        "said['gated'] = refused('me/gated')\n"
        "said['damaged'] = refused('me/damaged')\n"
        "delta = sf.SparseDelta.load('me/sw', revision='v1')\n"
        "delta.meta |= {'lang': 'sw', 'license': 'mit'}\n"
        "said['url'] = delta.push_to_hub('me/new', token='hf_x')\n"
        "said['pushed'] = delta == sf.SparseDelta.load('me/new')\n"
        "delta.push_to_hub('me/new', token='hf_x')\n",
    )
    assert said["main"] == [1.0, -2.0, 3.0]
    assert said["v1"] == [0.5, -2.0, 3.0]
    assert "repository on the Hugging Face Hub" in said["no repository"]
    assert "me/sw@v9: the Hub repository has no revision 'v9'" in said["no revision"]
    assert "holds neither sft.safetensors nor pytorch_diff.bin" in said["no SFT"]
    assert "must be granted" in said["gated"]
    assert "metadata" in said["damaged"] or "header" in said["damaged"]
    assert said["url"] == f"{hub}/me/new/commit/{COMMITS['main']}"
    assert said["pushed"]
    card = Hub.files["me/new", "main", "README.md"].decode()
    assert 'sf.SparseDelta.load("me/new")' in card
    # The second upload left the card alone.
    commits = [line for line in Hub.log if "/commit/" in line]
    assert len(commits) == 2
    # What was fetched once is there without the Hub; what was not is refused with the reason.
    said = run(
        "http://127.0.0.1:9",
        home,
        "said['cached'] = sf.SparseDelta.load('me/sw').val.tolist()\n"
        "said['v1'] = sf.SparseDelta.load('me/sw', revision='v1').val.tolist()\n"
        "said['absent'] = refused('me/absent')\n",
        offline=True,
    )
    assert said["cached"] == [1.0, -2.0, 3.0]
    assert said["v1"] == [0.5, -2.0, 3.0]
    assert "is in the local cache" in said["absent"]


def test_a_path_has_no_revision(tmp_path):
    path = make().save(tmp_path / "x.safetensors")
    with pytest.raises(sf.SFTError, match="no revision 'v1'"):
        sf.SparseDelta.load(path, revision="v1")


@pytest.mark.parametrize("source", ["absent.safetensors", "a/b/c", "owner/x.bin", "../up", "x y/z"])
def test_what_no_repository_can_be_called_is_a_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SFTFileError, match="no such file"):
        sf.SparseDelta.load(source)


def test_a_name_in_a_folder_that_is_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make().save(tmp_path / "runs" / "sw.safetensors")
    fetched = []
    monkeypatch.setattr(sf.hub, "download", lambda *given: fetched.append(given) or "x.safetensors")
    with pytest.raises(SFTFileError, match=r"runs/ws: .* runs holds 'sw\.safetensors'"):
        sf.SparseDelta.load("runs/ws")
    assert not fetched
    assert sf.hub.located("runs/ws", "main") == "x.safetensors"
    assert sf.hub.located("owner/ws") == "x.safetensors"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, KeyError, EOFError])
def test_whatever_a_download_raises_is_named(monkeypatch, error):
    def broken(*_, **__):
        raise error("the connection broke\nin the middle")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(SFTFileError, match=r"^owner/name@v1: cannot be fetched.*connection broke"):
        sf.hub.download("owner/name", "v1")


def test_an_unreachable_hub_is_asked_once(monkeypatch, tmp_path):
    asked = []

    def unreachable(repo, name, **_):
        asked.append(name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(SFTFileError, match=r"neither .* is in the local cache"):
        sf.hub.download("owner/name")
    assert asked == ["sft.safetensors"]
    # The other name is looked for where it costs nothing.
    cached = str(tmp_path / "pytorch_diff.bin")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: cached)
    assert sf.hub.download("owner/name") == cached


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SFTFileError, match=r"sparse-ft\[hub\]"):
        sf.SparseDelta.load("owner/name")
    with pytest.raises(SFTFileError, match=r"sparse-ft\[hub\]"):
        make().push_to_hub("owner/name")


def front(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_model_card():
    delta = make(
        lang="sw",
        role="language",
        license="apache-2.0",
        base={"id": "xlm-roberta-base", "revision": "main"},
        recipe={"method": "lt-sft", "l1": 0.1},
    )
    card = delta.model_card("me/xlmr-sw")
    fields = front(card)
    assert fields["language"] == ["sw"]
    assert fields["license"] == "apache-2.0"
    assert fields["base_model"] == "xlm-roberta-base"
    assert fields["base_model_relation"] == "adapter"
    assert 'sf.SparseDelta.load("me/xlmr-sw")' in card
    assert "3 of 120,007" in card
    assert "encoder.weight (2)" in card
    assert delta.content_id in card
    assert "| recipe: l1 | 0.1 |" in card


def test_model_card_beyond_the_first_plane():
    name = "𐌰𐌱/漢字 🧊"
    delta = make(base={"id": name}, recipe={"data": name, "parts": [name]})
    assert front(delta.model_card())["base_model"] == name
    assert f'| recipe: parts | \\["{name}"\\] |' in delta.model_card()


def test_model_card_says_what_was_set():
    sources = [{"id": "ab" * 32, "alpha": 0.5}, {"id": "cd" * 32, "alpha": -1.0}]
    recipe = {"method": "ties", "eps": 0.0, "criterion": None, "seed": 0, "merged_from": sources}
    card = make(recipe=recipe, trained_on=sources).model_card()
    said = "0.5 × abababababababab…, -1 × cdcdcdcdcdcdcdcd…"
    assert f"| recipe: merged\\_from | {said} |" in card
    assert f"| trained with | {said} |" in card
    assert "| recipe: seed | 0 |" in card
    assert "eps" not in card
    assert "criterion" not in card
    for odd in ([1], [{"id": 3, "alpha": 1}], [{"alpha": "x", "id": "y"}], {"id": 1}, 1.5):
        assert "recipe: merged" in make(recipe={"merged_from": odd}).model_card()


def test_model_card_of_foreign_text_is_inert():
    hostile = "x: |[link](http://e)<script>`# ---"
    delta = make(license=hostile, task=hostile, base={"id": hostile}, recipe={"method": hostile})
    card = delta.model_card()
    assert front(card)["base_model"] == hostile
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body.replace("\\<", "")
    assert "[link]" not in body.replace("\\[", "")


def test_model_card_of_absolute_values():
    assert "write_patch" in make(kind="replace").model_card()
    assert "sf.compose" not in make(kind="replace").model_card()
