"""The record of a data set: a folder that can be moved, and whose content has one name."""

import json
import shutil

import pytest

from benchmarks.transfer.dataset import Dataset, DatasetError


def made(folder, **settings):
    folder.mkdir(exist_ok=True)
    for name in ("en", "xx", "train", "dev", "test", "view", "groups"):
        (folder / f"{name}.txt").write_text(f"text of {name}\n")
    whole = {
        "name": "pos",
        "task": "tokens",
        "metric": "accuracy",
        "source": "en",
        "targets": ("xx",),
        "development": ("yy",),
        "train": folder / "train.txt",
        "dev": folder / "dev.txt",
        "test": {"xx": folder / "test.txt"},
        "text": {"en": folder / "en.txt", "xx": folder / "xx.txt"},
        "stage0": (folder / "en.txt",),
        "views": {"xx": {"unambiguous": folder / "view.txt"}},
        "groups": {"xx": folder / "groups.txt"},
        "options": {"unlabelled": ["X", "PUNCT"]},
        "about": {"packages": {"mediawiki": {"version": "1"}}},
    }
    return Dataset(**{**whole, **settings})


def test_a_saved_data_set_is_itself_wherever_it_is_moved(tmp_path):
    first = made(tmp_path / "a").save(tmp_path / "a")
    assert "/" not in json.loads((tmp_path / "a" / "manifest.json").read_text())["train"]
    assert Dataset.load(tmp_path / "a") == first
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = Dataset.load(tmp_path / "b")
    assert moved.views["xx"]["unambiguous"] == (tmp_path / "b" / "view.txt").resolve()
    assert moved.content == made(tmp_path / "a").content


@pytest.mark.parametrize("changed", ["train.txt", "view.txt", "groups.txt"])
def test_content_names_the_bytes_of_every_file(tmp_path, changed):
    before = made(tmp_path).content
    dataset = made(tmp_path)
    (tmp_path / changed).write_text("other\n")
    assert dataset.content != before
    assert made(tmp_path, metric="f1").content != dataset.content


def test_files_elsewhere_keep_their_place(tmp_path):
    dataset = made(tmp_path / "a")
    (tmp_path / "b").mkdir()
    dataset.save(tmp_path / "b")
    assert Dataset.load(tmp_path / "b").train == (tmp_path / "a" / "train.txt").resolve()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ()}, "no target"),
        ({"development": ("xx",)}, "xx cannot be a target and"),
        ({"targets": ("xx", "en")}, "en cannot be a target and"),
        ({"test": {}}, "no test data for the target xx"),
        ({"text": {}}, "no text for the target xx"),
    ],
)
def test_contradictions_are_refused(tmp_path, settings, said):
    with pytest.raises(DatasetError, match=said):
        made(tmp_path, **settings)


def test_folders_that_hold_none_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"no manifest\.json"):
        Dataset.load(tmp_path)
    dataset = made(tmp_path)
    dataset.save(tmp_path)
    (tmp_path / "view.txt").unlink()
    with pytest.raises(DatasetError, match=r"lacks .*view\.txt"):
        Dataset.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="lacks"):
        dataset.save(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    for text, said in (("[", "not a manifest"), ("{}", "schema"), ('{"schema": 9}', "schema 9")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DatasetError, match=said):
            Dataset.load(tmp_path)
