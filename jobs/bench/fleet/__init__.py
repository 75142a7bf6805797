"""``palisade bench fleet``: what cycles over a fleet cost."""
