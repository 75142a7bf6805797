"""``palisade site``: one site or the list of them."""
