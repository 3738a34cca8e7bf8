from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import one_model, quality, report
from benchmarks.labelled_offers import divide
from benchmarks.our_models import MODELS, STAGES, Workshop
from benchmarks.plots import pareto_front
from ml.stages import stage_named
from ml.taxonomy import Category, Taxonomy

TITLES = {"tea": "green tea leaves", "car": "fast red car", "shoe": "leather running shoe"}


@pytest.fixture
def feed(tmp_path, monkeypatch):
    """Options for a feed of three categories that a linear model learns, and the folder of results."""
    rows = [
        {
            "offer_id": f"{category}{number}",
            "shop_id": f"shop{number % 12}",
            "title": f"{title} number {number}",
            "description": f"buy this {title}",
            "category_id": category,
        }
        for category, title in TITLES.items()
        for number in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "feed.parquet")
    tree = "category_id,parent_id,name\ntop,,All\nother,,Else\n"
    tree += "".join(f"{name},{'top' if name == 'tea' else 'other'},{name}\n" for name in TITLES)
    (tmp_path / "tree.csv").write_text(tree)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    arguments = [
        "tiny",
        "--quick",
        "--offers",
        f"{tmp_path / 'feed.parquet'}",
        "--work",
        f"{tmp_path / 'work'}",
    ]
    return [
        *arguments,
        "--taxonomy",
        f"{tmp_path / 'tree.csv'}",
        "--only",
    ], tmp_path / "benchmarks" / "results"


def test_two_cheap_models_from_a_feed_to_table_json_and_picture(feed, capsys):
    arguments, results = feed
    quality.main([*arguments, "linear_title", "fasttext"])
    figures = msgspec.json.decode((results / "quality_tiny.json").read_bytes())
    linear, fasttext = figures["models"]
    assert linear["mean"] > 0.9
    assert {"level_1", "level_2", "macro", "bands", "training_seconds", "size_bytes"} <= set(linear)
    for speed in (linear["one_thread"], linear["all_cores"]):
        assert speed["offers_per_second"] > 0
        assert speed["peak_memory_bytes"] > speed["memory_before_bytes"] > 0
    assert fasttext.get("not_run", "").startswith("package fasttext") or fasttext["mean"] > 0
    assert (results / "quality_tiny.png").stat().st_size > 1_000
    printed = capsys.readouterr().out
    assert "TF-IDF + LinearSVC, title" in printed
    assert "offers of held-out products are not trained on" in printed or "note" not in printed


def test_fewer_offers_to_learn_from_give_a_learning_curve(feed, capsys):
    arguments, results = feed
    quality.main([*arguments, "linear_title", "--training-shares", "0.5", "--reach", "0.999"])
    figures = msgspec.json.decode((results / "quality_tiny.json").read_bytes())
    (part,), (curve,) = figures["further"], figures["learning_curves"]
    assert part["trial"] == "0.5 of what is learned from"
    assert part["held_out_offers"] == figures["held_out_offers"]
    assert 0 < part["training_offers"] < figures["training_offers"]
    assert curve["points"] == [
        [part["training_offers"], part["models"][0]["mean"]],
        [figures["training_offers"], figures["models"][0]["mean"]],
    ]
    assert set(curve["offers_for"]) == {"0.999"}
    assert (results / "quality_tiny_offers.png").stat().st_size > 1_000
    assert "offers for 0.999" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--training-shares 1e-09: no offer would be left"):
        quality.main([*arguments, "linear_title", "--training-shares", "1e-9"])


@pytest.mark.parametrize(
    "wrong", [["--reach", "1"], ["--training-shares", "0"], ["--training-shares", "half"]]
)
def test_what_no_curve_can_be_drawn_of_is_refused_before_anything_is_trained(feed, wrong, capsys):
    arguments, _ = feed
    with pytest.raises(SystemExit):
        quality.main([*arguments, "linear_title", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(feed, monkeypatch):
    arguments, _ = feed
    asked = []

    def answered(task, packages=None):
        asked.append((task.kind, task.model, task.cores))
        if task.kind == "train":
            if task.model == "linear_fields" and asked.count(asked[-1]) == 1:
                raise KeyboardInterrupt
            return one_model.Outcome(seconds=1.0)
        if task.kind == "answer":
            count = pq.read_metadata(task.offers).num_rows
            outcome = one_model.Outcome(answers=["tea"] * count)
        else:
            speed = one_model.Speed(
                offers_per_second=10.0,
                lowest=9.0,
                highest=11.0,
                offers=5,
                peak_memory_bytes=2,
                memory_before_bytes=1,
                load_seconds=0.1,
            )
            outcome = one_model.Outcome(speed=speed)
        Path(task.result).parent.mkdir(exist_ok=True)
        Path(task.result).write_bytes(msgspec.json.encode(outcome))
        return outcome

    monkeypatch.setattr(one_model, "run", answered)
    models = ["linear_title", "linear_fields"]
    with pytest.raises(KeyboardInterrupt):
        quality.main([*arguments, *models])
    of_title = [one for one in asked if one[1] == "linear_title"]
    assert len(of_title) >= 3
    quality.main([*arguments, *models])
    assert [one for one in asked if one[1] == "linear_title"] == of_title
    done = len(asked)
    quality.main([*arguments, *models])
    assert len(asked) == done


def test_a_model_that_cannot_run_is_a_row_with_its_reason(feed, monkeypatch, capsys):
    arguments, results = feed

    def refused(task, packages=None):
        return one_model.Outcome(not_run=f"package of {task.model} is not installed")

    monkeypatch.setattr(one_model, "run", refused)
    quality.main([*arguments, "linear_title", "linear_averaged", "setfit"])
    rows = msgspec.json.decode((results / "quality_tiny.json").read_bytes())["models"]
    assert [row["not_run"] for row in rows] == [
        "package of linear_title is not installed",
        "needs linear_title, linear_fields",
        "package of setfit is not installed",
    ]
    assert "package of setfit is not installed" in capsys.readouterr().out


def test_a_process_that_fails_says_why(tmp_path):
    task = one_model.Task(
        kind="answer",
        model="linear_title",
        folder=str(tmp_path),
        result=str(tmp_path / "r.json"),
        offers="nowhere.parquet",
    )
    assert "nowhere.parquet" in one_model.run(task).not_run


def test_scores_count_what_was_never_trained_in_a_band_of_its_own():
    taxonomy = Taxonomy([Category(name, None, name) for name in "abc"])
    truth = pa.table({"category_id": ["a", "a", "b", "c"]})
    figures = quality.scored(taxonomy, truth, ["a", "b", "b", "a"], {"a": 150, "b": 3})
    assert figures["level_1"] == figures["mean"] == pytest.approx((2 * 0.5 + 2 / 3) / 4)
    assert {band: row["offers"] for band, row in figures["bands"].items()} == {"0": 1, "1-4": 1, "100+": 2}


def test_the_front_is_what_none_beats_in_both():
    points = [(1.0, 0.9), (2.0, 0.8), (1.5, 0.7), (10.0, 0.5), (9.0, 0.5)]
    assert pareto_front(points) == [0, 1, 3]


def test_labels_that_the_taxonomy_lacks_are_refused(feed, tmp_path):
    arguments, _ = feed
    (tmp_path / "tree.csv").write_text("category_id,parent_id,name\ntea,,Tea\n")
    with pytest.raises(SystemExit, match="2 labels are no category"):
        quality.main([*arguments, "linear_title"])


def test_parameters_are_changed_by_stage(feed):
    arguments, _ = feed
    with pytest.raises(SystemExit, match="a stage of"):
        quality.main([*arguments, "linear_title", "--set", "teacher.epochs=3"])


def test_ablations_change_parameters_of_stages_that_exist():
    measured = {model.stage for model in MODELS}
    for ablation in quality.ABLATIONS:
        assert ablation.stage in measured
        for stage in ablation.changes:
            assert stage in STAGES
            assert stage_named(stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablations", "--variants", "magic"], "student without distillation"),
        (["--ablations", "teacher", "--variants", "distillation"], "teacher without"),
        (["--variants", "distillation"], "none without --ablations"),
    ],
)
def test_a_variant_that_does_not_exist_is_refused(feed, options, message):
    arguments, _ = feed
    with pytest.raises(SystemExit, match=message):
        quality.main([*arguments, "linear_title", *options])


def test_no_stage_sees_a_held_out_offer(feed, monkeypatch):
    arguments, _ = feed
    seen = []

    def trained(workshop, inputs, last="compiled_student"):
        for folder, file in (("training_sample", "labelled"), ("evaluation_set", "offers")):
            path = inputs[folder] / f"{file}.parquet"
            seen.append(set(pq.read_table(path)["offer_id"].to_pylist()))
        return iter(())

    held_out = []

    def divided(*given):
        found = divide(*given)
        held_out.extend(found.test["offer_id"].to_pylist())
        return found

    monkeypatch.setattr(Workshop, "train", trained)
    monkeypatch.setattr(quality, "divide", divided)
    quality.main([*arguments, "fast"])
    of_sample, of_evaluation = seen
    assert held_out
    assert of_sample
    assert of_evaluation
    assert not (of_sample | of_evaluation) & set(held_out)


def test_with_a_labelled_share_the_other_training_offers_are_read_without_their_labels(feed, monkeypatch):
    arguments, results = feed
    seen = {}

    def trained(workshop, inputs, last="compiled_student"):
        for file in ("labelled", "unlabelled"):
            seen[file] = pq.read_table(inputs["training_sample"] / f"{file}.parquet")
        return iter(())

    monkeypatch.setattr(Workshop, "train", trained)
    quality.main([*arguments, "fast"])
    everything = set(seen["labelled"]["offer_id"].to_pylist())
    assert not len(seen["unlabelled"])
    quality.main([*arguments, "fast", "--labelled-share", "0.3"])
    labelled, unlabelled = seen["labelled"], seen["unlabelled"]
    assert 0 < len(labelled) < len(everything) / 2
    ids = [*labelled["offer_id"].to_pylist(), *unlabelled["offer_id"].to_pylist()]
    assert sorted(ids) == sorted(everything)
    assert unlabelled["category_id"].null_count == len(unlabelled)
    assert not labelled["category_id"].null_count
    figures = msgspec.json.decode((results / "quality_tiny.json").read_bytes())
    assert figures["training_offers"] == len(labelled)
    assert figures["unlabelled_offers"] == len(unlabelled)
    with pytest.raises(SystemExit, match=r"--labelled-share 1e-09: no offer keeps its label"):
        quality.main([*arguments, "fast", "--labelled-share", "1e-9"])
