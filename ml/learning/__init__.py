"""Teacher, its labels, and the models that learn from them."""
