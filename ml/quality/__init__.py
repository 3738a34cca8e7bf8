"""How good the categories were that offers got, as people see it later."""
