"""``python -m tests.resources.stand_in``: the command line of ``ml`` with stages that do as they are told."""

from __future__ import annotations

import os
import signal
import sys
import time

from ml import stages
from ml.__main__ import main
from ml.errors import InputError
from ml.runner import StageContext
from ml.stages import Parameters, Stage


class StandInParameters(Parameters, frozen=True, kw_only=True):
    behaviour: str = "succeed"
    text: str = "hello"


def run(context: StageContext, parameters: StandInParameters) -> dict[str, int]:
    upstream = context.optional_input("upstream")
    text = (upstream / "text").read_text() if upstream else ""
    text += "".join((folder / "text").read_text() for folder in context.partitions("days").values())
    context.progress.say(f"process {os.getpid()} writes {parameters.text}")
    begun_before = (context.checkpoints / "begun").exists()
    (context.checkpoints / "begun").touch()
    match parameters.behaviour:
        case "input error":
            raise InputError("offers.csv row 7: price is 'abc', expected a number")
        case "crash":
            raise RuntimeError("something broke")
        case "be killed once" if not begun_before:
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang once" if not begun_before:
            time.sleep(600)
        case "hang":
            time.sleep(600)
    (context.output / "text").write_text(text + parameters.text)
    return {"characters": len(text + parameters.text), "continued": int(begun_before)}


STAND_INS = {
    name: Stage(
        name=name,
        version="1",
        summary="Writes a text.",
        entry_point="tests.resources.stand_in:run",
        parameters=StandInParameters,
        optional_inputs=("upstream",),
        partitioned_inputs=partitioned,
        heavy=name != "light",
    )
    for name, partitioned in (("light", ()), ("heavy", ()), ("upstream", ()), ("gathering", ("days",)))
}


if __name__ == "__main__":
    stages.STAGES.update(STAND_INS)
    sys.exit(main())
