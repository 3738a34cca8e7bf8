"""Reading an offer feed, whatever its format: files to batches of text, nothing lost."""
