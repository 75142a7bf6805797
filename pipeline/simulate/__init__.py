"""The rendered world: faces, rigs, sites with their scripts, and corpora."""
