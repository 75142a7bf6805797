"""``palisade rollout``: releases over the fleet."""
