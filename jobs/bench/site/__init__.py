"""``palisade bench site``: site methods on recorded and rendered streams."""
