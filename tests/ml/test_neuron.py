"""All of AWS Neuron but its compiler and its devices: the SDK here is a stand-in that traces for torch."""

import json
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from ml.artifacts import read_manifest, verify
from ml.errors import InputError
from ml.evaluation.gate import GateLimits, compiled_matches_uncompiled
from ml.serving import neuron
from ml.serving.bucketed import BucketedModel
from ml.serving.compiled_model import CompiledModel, ModelSettings
from ml.serving.neuron import NeuronHost
from ml.serving.predictor import Predictor
from ml.serving.workers import cores_for_workers, single_thread_environment
from tests.ml.compiled_models import NEURON_SDK, TITLES, neuron_sdk

SDK = {"torch-neuronx": "2.9.0.2.15.32035", "neuronx-cc": "2.27.5334.0"}


@pytest.fixture
def sdk(monkeypatch):
    with neuron_sdk(monkeypatch):
        yield


def host(root: Path, devices: int = 1, name: str = "Inferentia2") -> NeuronHost:
    (root / "dev").mkdir()
    for number in range(devices):
        (root / "dev" / f"neuron{number}").touch()
    if name:
        architecture = root / "sys/devices/virtual/neuron_device/neuron0/info/architecture"
        architecture.mkdir(parents=True)
        (architecture / "device_name").write_text(f"{name}\n")
    return NeuronHost(root)


def test_the_compiler_is_called_for_inf2_without_a_device_once_per_bucket(neuron_student):
    lines = neuron_student.with_name("neuron-calls.jsonl").read_text().splitlines()
    traces, batched = [json.loads(line) for line in lines[::2]], [json.loads(line) for line in lines[1::2]]
    assert [trace["shapes"] for trace in traces] == [[[64, 16]] * 2, [[32, 32]] * 2]
    for trace in traces:
        assert trace["call"] == "trace"
        assert trace["target_at_import"] == "inf2"
        assert trace["types"] == ["torch.int32"] * 2
        assert trace["cpu_backend"] is True
        assert " ".join(trace["compiler_args"]) == (
            "--target inf2 --model-type transformer --auto-cast matmult --auto-cast-type bf16"
        )
    assert batched == [{"call": "dynamic_batch", "is_traced": True}] * 2


def test_the_artifact_says_with_what_and_for_what_it_was_compiled(neuron_student):
    settings = ModelSettings.read(neuron_student)
    assert settings.target == "neuron"
    assert settings.traced.versions == {"torch": metadata.version("torch"), **SDK}
    assert settings.traced.device_family == "inf2"
    assert settings.traced.compiler.startswith("neuronx-cc --target inf2")
    files = set(verify(neuron_student, kinds=["compiled_student"]).files)
    assert {bucket.file for bucket in settings.traced.buckets} < files


def test_another_sdk_than_the_one_asked_for_does_not_compile(sdk):
    assert neuron.load_compiler(neuron.SDK_VERSION).trace
    with pytest.raises(
        InputError, match=r"torch-neuronx 2\.9\.1 has to compile, here is 2\.9\.0\.2\.15\.32035"
    ):
        neuron.load_compiler("2.9.1")


def test_only_the_reference_is_compared_where_it_was_compiled_and_the_gate_does_not_take_it(neuron_student):
    metrics = read_manifest(neuron_student).metrics
    assert metrics["device_parity"] == "not measured"
    assert metrics["reference_offers"] == len(TITLES)
    assert metrics["reference_same_category"] == 1.0
    assert metrics["size_bytes"] > 0
    with pytest.raises(InputError, match="metric same_category is missing"):
        compiled_matches_uncompiled(metrics, GateLimits())


def test_on_a_neuron_host_with_its_sdk_it_answers_as_the_reference(
    neuron_student, traced_student, sdk, tmp_path
):
    settings = ModelSettings.read(neuron_student)
    model = BucketedModel(neuron_student, settings, host=host(tmp_path))
    expected = CompiledModel.open(traced_student).predict_logits(TITLES)
    assert model.predict_logits(TITLES).tobytes() == expected.tobytes()


def test_elsewhere_it_is_refused_in_one_line(neuron_student, tmp_path):
    with pytest.raises(
        InputError, match=r"compiled for neuron \(inf2; torch .*\); this is not a Neuron host"
    ):
        Predictor.load(neuron_student)
    with pytest.raises(InputError, match="not a Neuron host"):
        cores_for_workers(neuron_student)
    refuse(neuron_student, host(tmp_path), r"here torch-neuronx is not installed, expected 2\.9\.0\.2\.15")


def test_a_device_of_another_family_is_refused(neuron_student, sdk, tmp_path):
    refuse(
        neuron_student,
        host(tmp_path, name="Trainium2"),
        "the devices of this host are trn2. Serve it on inf2",
    )


def test_a_driver_that_does_not_tell_its_family_is_believed(neuron_student, sdk, tmp_path):
    BucketedModel(neuron_student, ModelSettings.read(neuron_student), host=host(tmp_path, name=""))


@pytest.mark.parametrize("package", ["torch-neuronx", "neuronx-cc", "torch"])
def test_another_version_of_the_sdk_is_refused(package, neuron_student, sdk, tmp_path, monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.1" if name == package else installed(name))
    refuse(neuron_student, host(tmp_path), f"here {package} is 2.8.1, expected 2")


def test_a_build_mark_makes_no_other_version(neuron_student, sdk, tmp_path, monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed(name).split("+")[0] + "+other")
    BucketedModel(neuron_student, ModelSettings.read(neuron_student), host=host(tmp_path))


def test_each_worker_gets_a_core_of_its_own(neuron_student, compiled_student, sdk, tmp_path):
    two_devices = host(tmp_path, devices=2)
    assert cores_for_workers(neuron_student, host=two_devices) == [0, 1, 2, 3]
    assert cores_for_workers(neuron_student, 3, two_devices) == [0, 1, 2]
    with pytest.raises(InputError, match="--workers 5: this host has 4 Neuron cores"):
        cores_for_workers(neuron_student, 5, two_devices)
    assert cores_for_workers(compiled_student, 5) == [None] * 5
    assert single_thread_environment(3)["NEURON_RT_VISIBLE_CORES"] == "3"
    assert "NEURON_RT_VISIBLE_CORES" not in single_thread_environment()


def test_a_worker_that_takes_the_place_of_another_takes_its_core(tmp_path):
    state_file = tmp_path / "state.json"
    program = (
        "import sys; from ml.serving import server\n"
        "server._WORKER_MODULE = 'tests.ml.idle_worker'\n"
        "options = server._options(['--model', '.', '--state-file', sys.argv[1]])\n"
        "server._Supervisor(options, 1, [0, 1, 2]).run()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program, state_file], cwd=NEURON_SDK.parents[2])
    try:
        eventually(state_file.exists)
        first = {process: core_of(process) for process in json.loads(state_file.read_bytes())["workers"]}
        assert sorted(first.values()) == ["0", "1", "2"]
        victim = next(process for process, core in first.items() if core == "1")
        subprocess.run(["kill", "-9", str(victim)], check=True)
        eventually(lambda: len(set(children_of(supervisor.pid)) - first.keys()) == 1)
        (successor,) = set(children_of(supervisor.pid)) - first.keys()
        eventually(lambda: core_of(successor) == "1")
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(30)


def refuse(folder: Path, on: NeuronHost, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        BucketedModel(folder, ModelSettings.read(folder), host=on)
    assert "\n" not in str(refusal.value)


def core_of(process: int) -> str | None:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    prefix = b"NEURON_RT_VISIBLE_CORES="
    return next((line.removeprefix(prefix).decode() for line in variables if line.startswith(prefix)), None)


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def eventually(happens) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)
