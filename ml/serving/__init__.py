"""From a student to answers: compilation, the predictor, bulk and the HTTP server."""
