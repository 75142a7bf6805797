"""Rendered labelled corpora, one file each, importable like a data set."""
