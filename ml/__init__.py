"""Learning and inference as plain functions over files and arrays.

Knows nothing of Dagster's graph and nothing of AWS: everything here can be used from a notebook or
run with ``python -m ml <stage>``. The catalogue of stages is :mod:`ml.stages`.
"""
