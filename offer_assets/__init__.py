"""The graph: what exists, what it depends on, what must be true of it, and which jobs make it.

One module per asset group, in the order of an offer's way. Nothing is re-exported here.
"""
