"""``palisade bench source``: source methods on left-out domains."""
