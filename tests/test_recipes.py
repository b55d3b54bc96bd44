"""The presets against the published figures, and what a recipe refuses."""

import json

import pytest

from sparse_ft.tasks.recipes import DEFAULTS, K_LADDER, LANGUAGE_K, RECIPES, RecipeError, recipe

# LT-SFT, footnote 5: "approximately 442K, 884K, 1.7M, 3.5M, 7.1M, and 14.2M".
LADDER = {32: 442_368, 16: 884_736, 8: 1_769_472, 4: 3_538_944, 2: 7_077_888, 1: 14_155_776}

# name: task, origin, K, λ, epochs, least and most steps, batch (per step), lr, chosen by, every.
LANGUAGE = ("mlm", "paper", 7_667_712, 0.1, (100, 100), 30_000, 100_000, 8, 5e-5, "loss", 1000)
PUBLISHED = {
    "lt-sft-language": LANGUAGE,
    "lt-sft-language-high-resource": (*LANGUAGE[:-1], 5000),
    "lt-sft-language-sweep": (*LANGUAGE[:6], 30_000, *LANGUAGE[7:]),
    "lt-sft-language-scripts": ("mlm", "scripts", *LANGUAGE[2:5], 10_000, *LANGUAGE[6:]),
    "lt-sft-pos": (
        *("tokens", "paper", 14_155_776, 0, (3, 10), None, None, 8, 5e-5),
        *("accuracy", 250),
    ),
    "lt-sft-ner": ("tokens", "paper", 14_155_776, 0, (3, 10), None, None, 8, 5e-5, "f1", 250),
    "lt-sft-masakhaner": (
        *("tokens", "paper", 14_155_776, 0, (3, 10), None, None, 8, 5e-5, "f1", 250),
    ),
    "lt-sft-dp": ("parsing", "paper", 14_155_776, 0, (3, 10), None, None, 8, 5e-5, "las", 250),
    "lt-sft-nli": (
        *("sequences", "paper", 14_155_776, 0, (5, 5), None, None, 32, 2e-5),
        *("accuracy", 625),
    ),
    "lt-sft-sentiment": (
        *("sequences", "scripts", 14_155_776, 0, (5, 5), None, None, 8, 2e-5),
        *("f1", "epoch"),
    ),
    "lt-sft-qa": ("qa", "scripts", 14_155_776, 0, (2, 2), None, None, 12, 3e-5, "f1", 2000),
    "lt-sft-qa-multisource": (
        *("qa", "scripts", 14_155_776, 0, (5, 5), None, None, 12, 3e-5),
        *(None, None),
    ),
}


def test_the_ladder_of_k():
    assert K_LADDER == LADDER
    # A bottleneck of 768/2 in 12 layers, and an invertible adapter: 4.3 % of mBERT's parameters.
    assert LANGUAGE_K == 7_667_712 == LADDER[2] + 768**2
    assert round(LANGUAGE_K / 177_853_440, 3) == 0.043
    assert round(LANGUAGE_K / 278_043_648, 3) == 0.028


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_figures(name):
    task, origin, k, l1, epochs, least, most, batch, lr, metric, every = PUBLISHED[name]
    r = RECIPES[name]
    assert (r.name, r.task, r.origin, r.k, r.density) == (name, task, origin, k, None)
    assert r.l1 == (l1, l1)
    assert (r.epochs, r.steps, r.min_steps, r.max_steps) == (epochs, None, least, most)
    assert (r.batch_size * r.accumulate, r.lr, r.schedule) == (batch, lr, "linear")
    assert (r.metric, r.evaluate_every) == (metric, every)
    assert r.criterion == "magnitude"
    # The trainer's defaults, which neither paper nor scripts change.
    assert (r.weight_decay, r.max_grad_norm, r.warmup, r.iterations) == (0, 1, 0, 1)
    assert r.freeze_norms
    assert r.decouple == (task == "mlm")


def test_types_that_one_of_two_corpora_lacks_count_as_none():
    # LT-SFT, footnote 3.
    assert RECIPES["lt-sft-masakhaner"].options == {"outside": ["DATE", "MISC"]}


def test_scripts_accumulate():
    assert [RECIPES[f"lt-sft-{n}"].accumulate for n in ("language-scripts", "sentiment")] == [2, 2]


def test_languages_hold_out_what_the_paper_does():
    assert RECIPES["lt-sft-language"].held_out == 0.05
    assert RECIPES["lt-sft-language-high-resource"].held_out == 0.01
    assert {r.max_length for r in RECIPES.values() if r.task == "mlm"} == {256}


def test_what_is_not_published_is_marked():
    for name, r in RECIPES.items():
        assert r.origin in ("paper", "scripts", "inferred", "ours")
        assert (r.origin == "inferred") == name.startswith("deft-x")
        assert (r.criterion == "denoised") == name.startswith("deft-x")
    assert set(PUBLISHED) == {
        name for name, r in RECIPES.items() if r.origin in ("paper", "scripts")
    }


def test_each_kind_of_training_has_its_default():
    for task, name in DEFAULTS.items():
        assert RECIPES[name].task == task


def test_roles():
    assert {r.task: r.role for r in RECIPES.values()} == {
        **dict.fromkeys(("mlm", "clm"), "language"),
        **dict.fromkeys(("tokens", "sequences", "qa", "parsing"), "task"),
    }


def test_one_number_counts_for_both_phases():
    r = recipe("lt-sft-pos", epochs=2, l1=[0.1, 0.2])
    assert r.epochs == (2, 2)
    assert r.l1 == (0.1, 0.2)


def test_a_learning_rate_is_one_or_two_and_recorded_as_given():
    assert recipe("lt-sft-pos", lr=1e-3).to_dict()["lr"] == 1e-3
    r = recipe("lt-sft-pos", lr=[2e-4, 4e-4])
    assert r.lr == (2e-4, 4e-4)
    assert r.to_dict()["lr"] == [2e-4, 4e-4]
    assert r.changed(lr=1e-3).lr == 1e-3


def test_steps_take_the_place_of_epochs_and_their_limits():
    r = recipe("lt-sft-language", steps=(100, 200))
    assert (r.epochs, r.steps, r.min_steps, r.max_steps) == (None, (100, 200), None, None)
    assert [length.resolve(7) for length in recipe("lt-sft-language", epochs=1).lengths()] == [7, 7]
    assert recipe("lt-sft-language", epochs=1, max_steps=5).lengths()[0].resolve(7) == 5
    assert recipe("lt-sft-language", min_steps=5).min_steps == 5


def test_density_takes_the_place_of_k():
    r = recipe("lt-sft-nli", density=0.05)
    assert (r.k, r.density) == (None, 0.05)
    assert recipe("causal-language", k=10).density is None


def test_full_tuning_selects_nothing_and_stays_near_nothing():
    r = recipe("deft-x-language", full=True, steps=5)
    assert (r.k, r.density, r.l1, r.iterations) == (None, None, (0, 0), 1)
    assert (r.freeze_norms, r.decouple, r.criterion_options) == (False, False, {})
    assert not {"k", "l1", "criterion", "iterations"} & r.to_dict().keys()
    assert r.changed(lr=1e-3).full


def test_a_criterion_has_its_own_options_and_its_own_entries():
    assert recipe("deft-x-nli", criterion="magnitude").criterion_options == {}
    assert recipe("deft-x-nli", criterion="denoised").criterion_options == {"rank": "var:0.9"}
    r = recipe("deft-x-nli", criterion="snip", criterion_options={"samples": 3})
    assert r.criterion_options == {"samples": 3}
    r = recipe("lt-sft-nli", criterion="bias")
    assert (r.k, r.density) == (None, None)


def test_what_changed_is_told_apart():
    assert recipe("lt-sft-nli") == RECIPES["lt-sft-nli"]
    said = recipe("lt-sft-nli", lr=1e-3).to_dict()
    assert said["preset"] == "lt-sft-nli"
    assert said["lr"] == 1e-3
    assert said["changed"] == ["lr"]
    assert "changed" not in RECIPES["lt-sft-nli"].to_dict()
    assert json.loads(json.dumps(said)) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 0}, "k must be a whole number of at least 1; found 0"),
        ({"k": True}, "k must be"),
        ({"k": 5, "density": 0.1}, "give k or density, not both"),
        ({"k": None}, "k or density is needed; full=true tunes every entry"),
        ({"full": True, "density": 0.1}, "full tunes every entry, without density"),
        ({"full": True, "criterion": "weight"}, "full tunes every entry, without criterion"),
        ({"criterion": "bias", "density": 0.1}, "criterion 'bias' fixes its entries; give nei"),
        ({"steps": 5, "epochs": 1}, "give steps or epochs, not both"),
        ({"density": 0.0}, r"density must be a share in \(0, 1\], 0.02 for 2 %; found 0.0"),
        ({"density": 1.5}, "density"),
        ({"lr": float("nan")}, "lr must be one number, or one .*, each above 0; found nan"),
        ({"lr": "fast"}, "lr must be one number, or .* above 0; found 'fast'"),
        ({"lr": (1e-4, 0)}, "lr must be .* above 0"),
        ({"lr": (1e-4, 1e-4, 1e-4)}, "lr must be one number, or one for the full and one for"),
        ({"l1": -1}, "l1 must be one number"),
        ({"steps": (1, 2, 3)}, "steps must be one number, or one for the full"),
        ({"steps": 1.5}, "steps"),
        ({"batch_size": None}, "batch_size must be"),
        ({"schedule": "step"}, "schedule must be linear, cosine or constant"),
        ({"evaluate_every": "step"}, "evaluate_every"),
        ({"precision": "fp8"}, "precision must be bf16 or fp16"),
        ({"held_out": 1}, "held_out"),
        ({"epochs": None}, "a length is needed: epochs or steps"),
        ({"min_steps": 10, "max_steps": 5}, r"min_steps \(10\) is beyond max_steps \(5\)"),
        ({"learning_rate": 1}, "there is no setting 'learning_rate'; there are k, density"),
        ({"name": "mine"}, "there is no setting 'name'"),
    ],
    ids=repr,
)
def test_a_setting_out_of_range_is_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        recipe("lt-sft-nli", **settings)


def test_a_mistyped_preset_is_found():
    with pytest.raises(RecipeError, match="no preset 'lt-sft-lang'; did you mean lt-sft-language"):
        recipe("lt-sft-lang")
    with pytest.raises(RecipeError, match="no preset 'x'; there are lt-sft-language, "):
        recipe("x")
