"""How good a model is, what it must reach, and whether artifacts hold what they promise."""
