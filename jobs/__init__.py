"""Drivers behind the command line; one job is one file."""
