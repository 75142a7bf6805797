"""Source training: methods that learn from labelled domains, and the fit of one model."""
