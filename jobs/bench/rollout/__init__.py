"""``palisade bench rollout``: what moving a fleet costs and what its guards stop."""
