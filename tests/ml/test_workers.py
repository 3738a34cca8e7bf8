import os
import subprocess
import sys
from pathlib import Path

from ml.cores import available_cores
from ml.serving.workers import single_thread_environment


def test_a_worker_finds_the_code_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    program = "import ml.serving.workers as found; print(found.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=single_thread_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(ended.stdout.strip()) == Path(__file__).resolve().parents[2] / "ml" / "serving" / "workers.py"


def test_what_python_path_names_already_stays_on_it(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    root, *others = single_thread_environment()["PYTHONPATH"].split(os.pathsep)
    assert (Path(root) / "ml" / "cores.py").is_file()
    assert others == ["/elsewhere"]


def test_cores_are_counted_where_the_system_knows_no_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1
