"""Source training: what is learned from labelled domains, and how one fit runs."""
