"""``palisade guard`` and ``palisade anchor``: verdicts and what they rest on."""
