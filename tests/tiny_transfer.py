"""A tiny data set of three languages and a base model, for runs of the transfer benchmark."""

from dataclasses import replace
from pathlib import Path

from tiny_bases import WORDS, bert_folder, sentences

from benchmarks.transfer.dataset import Dataset
from benchmarks.transfer.experiments import LANGUAGE, TAGGING, Settings

TAGS = {"X": WORDS[20:], "NOUN": WORDS[2:5], "PROPN": WORDS[15:19]}


def conllu(path: Path, n: int, seed: int, hidden: tuple[str, ...] = ()) -> Path:
    """Writes tagged sentences; the tags of hidden words are X."""
    blocks = []
    for i, words in enumerate(sentences(n, seed)):
        rows = [f"# sent_id = {seed}-{i}"]
        for j, word in enumerate(words, 1):
            tag = next((tag for tag, some in TAGS.items() if word in some), "VERB")
            tag = "X" if word in hidden else tag
            rows.append("\t".join([str(j), word, "_", tag, *"______"]))
        blocks.append("\n".join(rows))
    path.write_text("\n\n".join(blocks) + "\n\n", "utf-8")
    return path


def tiny_dataset(folder: Path) -> Dataset:
    """Tags, English to "xx" and "yy", with "zz" to choose settings on."""
    folder.mkdir(exist_ok=True)
    languages = ("xx", "yy", "zz", "en")
    text = {language: folder / f"{language}.txt" for language in languages}
    for seed, path in enumerate(text.values()):
        path.write_text("\n".join(map(" ".join, sentences(60, seed))) + "\n", "utf-8")
    test = {x: conllu(folder / f"{x}.conllu", 12, 10 + i) for i, x in enumerate(languages)}
    sure = {
        x: {"unambiguous": conllu(folder / f"{x}-sure.conllu", 12, 10 + i, ("dog", "the"))}
        for i, x in enumerate(languages)
    }
    groups = {x: folder / f"{x}.groups" for x in languages}
    for path in groups.values():
        path.write_text("".join(f"key-{i // 2}\n" for i in range(12)), "utf-8")
    return Dataset(
        name="tiny",
        task="tokens",
        metric="accuracy",
        source="en",
        targets=("xx", "yy"),
        development=("zz",),
        train=conllu(folder / "train.conllu", 40, 1),
        dev=conllu(folder / "dev.conllu", 10, 2),
        test=test,
        text=text,
        dev_of={"zz": conllu(folder / "zz-dev.conllu", 10, 3)},
        views=sure,
        groups=groups,
        options={"tags": "upos", "unlabelled": ["X"], "metric": "accuracy"},
        about={"packages": {"mediawiki": {"version": "1", "license": "GPL-2.0-or-later"}}},
    ).save(folder)


def tiny_base(folder: Path) -> Path:
    """A base model that reads them."""
    return bert_folder(folder)


def tiny_settings(**changes) -> Settings:
    """A few steps of everything."""
    short = {"max_length": 16, "batch_size": 8, "density": 0.2}
    language = LANGUAGE.changed(**short, steps=(4, 4), lr=1e-2, evaluate_every=2)
    task = TAGGING.changed(**short, steps=(6, 6), lr=1e-2, evaluate_every=3)
    settings = Settings(
        language=language,
        source=language.changed(steps=(3, 3)),
        task=task,
        ladder=(0.1, 0.2),
        grid=(0.1, 0.2),
        weight=0.5,
        save_every=2,
    )
    return replace(settings, **changes)
