"""``palisade audit``, ``notify`` and ``metrics``: what the record says to others."""
