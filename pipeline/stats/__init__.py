"""Rates, intervals and sequential tests: numbers in, numbers out."""
