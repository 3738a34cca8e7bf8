"""Whether a day of offers still looks like what the model was trained on."""
