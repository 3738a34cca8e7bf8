"""The main job as its user sees it: one command, a summary, a live endpoint."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from ml.artifacts import verify

from .conftest import Demo, environment, free_port, run

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(4000)]

ASSETS = {
    "catalog_taxonomy",
    "raw_offers",
    "offers",
    "evaluation_set",
    "training_sample",
    "teacher_checkpoint",
    "teacher_labels",
    "fast_checkpoint",
    "student_checkpoint",
    "student_evaluation",
    "compiled_student",
    "catalogued_offers",
    "drift_reference",
    "drift_report",
    "corrections",
    "live_quality",
}


def newest(demo: Demo, kind: str) -> Path:
    """Folder of the only, or the newest, artifact of a kind."""
    folders = sorted((demo.home / "artifacts" / kind).iterdir(), key=lambda folder: verify(folder).created_at)
    return folders[-1]


def test_every_artifact_of_the_graph_exists_and_is_what_its_manifest_says(demo: Demo) -> None:
    kinds = {folder.name for folder in (demo.home / "artifacts").iterdir()}
    assert kinds >= ASSETS
    for folder in (demo.home / "artifacts").glob("*/*"):
        manifest = verify(folder)
        assert manifest.kind == folder.parent.name
        assert manifest.key == folder.name


def test_a_kill_in_mid_training_costs_no_finished_work(demo: Demo) -> None:
    """The teacher continued from its checkpoint, and nothing half-made was left or shown."""
    assert "teacher_checkpoint" in demo.killed_output
    assert re.search(r"resumed from the checkpoint at step [1-9]", demo.output)
    for asset in ("catalog_taxonomy", "raw_offers", "offers", "training_sample"):
        assert re.search(rf"\] {asset}\b.* unchanged", demo.output), asset
    assert not [path for path in (demo.home / "work").glob("*/*") if path.is_dir()], (
        "work in progress was left"
    )


def test_the_summary_gives_the_figures_a_person_asks_for(demo: Demo) -> None:
    for figure in (
        r"offers in\s+5,\d{3}",
        r"clean\s+\d",
        r"quarantined\s+\d",
        r"categories\s+\d{3}",
        r"teacher\s+0\.\d{3}\s+0\.\d{3}\s+0\.\d{3}\s+\d+\.\d MB",
        r"student\s+0\.\d{3}",
        r"fast\s+0\.\d{3}",
        r"cascade\s+0\.\d{3}\s+0\.\d{3}\s+\d+\.\d MB",
        r"compiled by\s+onnx-\S+\s+\d+\.\d\d% of the student's categories",
        r"at [\d,]+ offers/s through the endpoint",
        r"open the UI\s+make dev",
    ):
        assert re.search(figure, demo.output), figure


def test_the_curl_line_of_the_summary_works(demo: Demo) -> None:
    line = re.search(r"try it\s+(curl .*)", demo.output).group(1)
    _, _, url, _, header, _, body = shlex.split(line)
    answer = httpx.post(url, content=body.encode(), headers=dict([header.split(": ")])).json()
    (prediction,) = answer["predictions"]
    assert prediction["category_path"]
    assert 0 < prediction["confidence"] <= 1
    assert prediction["offer_id"] == json.loads(body)["offers"][0]["offer_id"]


def test_every_clean_offer_of_the_newest_day_is_in_the_catalogue(demo: Demo) -> None:
    catalogued = newest(demo, "catalogued_offers")
    offers_digest = verify(catalogued).inputs["offers"]
    (offers,) = [
        f for f in (demo.home / "artifacts" / "offers").iterdir() if verify(f).digest == offers_digest
    ]
    left = pq.read_table(offers / "offers.parquet", columns=["offer_id"])["offer_id"]
    table = pq.read_table(catalogued / "catalogued.parquet")
    assert table["offer_id"].to_pylist() == left.to_pylist()
    assert table.column_names[:8] == [
        "offer_id",
        "category_id",
        "category_path",
        "confidence",
        "tier",
        "needs_review",
        "model_version",
        "taxonomy_version",
    ]
    assert set(table["model_version"].to_pylist()) == {verify(newest(demo, "compiled_student")).digest[:12]}


def test_a_second_run_finds_everything_unchanged(second_run: str) -> None:
    for asset in ("teacher_checkpoint", "student_checkpoint", "compiled_student", "catalogued_offers"):
        assert re.search(rf"\] {asset}\b.* unchanged", second_run), second_run


def test_classify_by_hand_agrees_with_the_endpoint(demo: Demo, tmp_path: Path) -> None:
    feed = sorted(demo.home.glob("demo_feed/offers-*.parquet"))[-1]
    out = tmp_path / "classified.parquet"
    finished = run(["ml", "classify", "--model", "current", str(feed), str(out)], demo.env)
    assert finished.returncode == 0, finished.stderr[-3000:]
    by_hand = pq.read_table(out, columns=["offer_id", "category_id"]).to_pylist()
    assert [row["offer_id"] for row in by_hand] == pq.read_table(feed, columns=["offer_id"])[
        "offer_id"
    ].to_pylist()
    by_endpoint = pq.read_table(
        newest(demo, "catalogued_offers") / "catalogued.parquet", columns=["offer_id", "category_id"]
    ).to_pylist()
    classified = {(row["offer_id"], row["category_id"]) for row in by_hand}
    assert all((row["offer_id"], row["category_id"]) in classified for row in by_endpoint)


def test_a_drifted_day_ends_in_a_failed_check_with_its_report(drifted: str) -> None:
    assert "check volume_is_usual failed (ERROR)" in drifted
    report = re.search(r"Report: (\S+)", drifted).group(1)
    assert "<html" in Path(report).read_text(encoding="utf-8")[:2000].lower()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"OFFER_FEED": "nowhere/*.parquet", "CATALOG_TAXONOMY": "nowhere.csv"}, "OFFER_FEED"),
        ({"OFFER_ASSETS_ENV": "moon"}, "OFFER_ASSETS_ENV"),
        ({"OFFER_ASSETS_TEACHER_EPOCHS": "many"}, "OFFER_ASSETS_TEACHER_EPOCHS"),
        ({"OFFER_ASSETS_TECHER_EPOCHS": "3"}, "OFFER_ASSETS_TEACHER_EPOCHS"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    answer = run(["offer_assets", "demo"], environment(tmp_path / "home", **settings))
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["truncated.parquet", "no_title.csv", "truncated.csv.gz"])
def test_an_unreadable_feed_fails_its_day_naming_the_file(tmp_path: Path, name: str) -> None:
    import gzip

    (tmp_path / "taxonomy.csv").write_text("category_id,parent_id,name\n1,,A\n2,1,B\n")
    rows = "offer_id,shop_id,title\n" + "".join(f"{i},s,title {i}\n" for i in range(5000))
    content = {
        "truncated.parquet": b"PAR1 and then nothing",
        "no_title.csv": b"offer_id,shop_id\n1,s\n",
        "truncated.csv.gz": gzip.compress(rows.encode())[:-2000],
    }[name]
    (tmp_path / name).write_bytes(content)
    answer = run(
        ["offer_assets", "demo"],
        environment(
            tmp_path / "home",
            OFFER_FEED=str(tmp_path / name),
            CATALOG_TAXONOMY=str(tmp_path / "taxonomy.csv"),
            OFFER_ASSETS_ENDPOINT_PORT=str(free_port()),
        ),
    )
    assert answer.returncode == 1
    lines = [line for line in answer.stderr.splitlines() if line.startswith("  raw_offers: ")]
    assert len(lines) == 1, answer.stderr
    assert name in lines[0]


def test_make_help_lists_the_commands() -> None:
    help_text = subprocess.run(["make", "help"], capture_output=True, text=True, check=True).stdout
    assert {"demo", "dev", "test"} <= set(re.findall(r"make (\S+)", help_text))
