"""``palisade bench``: every published figure, measured again by one command."""
