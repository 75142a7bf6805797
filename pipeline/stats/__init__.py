"""Error rates, bootstrap intervals and anytime-valid tests: pure functions from arrays to numbers."""
