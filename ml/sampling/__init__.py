"""Which offers a model learns from, and which it is measured on."""
