"""One program per figure that the README quotes; ``python -m benchmarks`` runs them all.

Each prints a table and writes ``benchmarks/results/<name>.json``: what was measured, on what machine.
"""
