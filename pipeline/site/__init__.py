"""Site adaptation: what one site may learn from its stream, and how K sites learn together."""
