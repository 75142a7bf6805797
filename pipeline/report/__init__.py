"""Pages for people: typed content in, one HTML file out."""
