"""A serving process that says it listens and does nothing, until its parent is gone or ends it."""

import os
import sys

import msgspec

from ml.serving.server import Listening

report_fd = int(sys.argv[sys.argv.index("--report-fd") + 1])
os.write(report_fd, msgspec.json.encode(Listening(model_version="idle")))
sys.stdin.read()
