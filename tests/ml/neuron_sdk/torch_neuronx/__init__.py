"""Stands in for the AWS Neuron SDK: compiles with torch.jit.trace, and notes how it was called."""

import json
import os
from pathlib import Path

import torch

_TARGET_AT_IMPORT = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")


def trace(func, example_inputs, *_, compiler_args=None, cpu_backend=False):
    _note(
        call="trace",
        target_at_import=_TARGET_AT_IMPORT,
        shapes=[list(tensor.shape) for tensor in example_inputs],
        types=[str(tensor.dtype) for tensor in example_inputs],
        compiler_args=compiler_args,
        cpu_backend=cpu_backend,
    )
    return torch.jit.trace(func, example_inputs, check_trace=False)


def dynamic_batch(neuron_script):
    _note(call="dynamic_batch", is_traced=isinstance(neuron_script, torch.jit.ScriptModule))
    return neuron_script


def _note(**what):
    if path := os.environ.get("TESTS_NEURON_CALLS"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")
