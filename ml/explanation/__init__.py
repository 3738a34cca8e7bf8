"""Why an offer got its category: the words that spoke for it, and the labelled offers it is most like."""
