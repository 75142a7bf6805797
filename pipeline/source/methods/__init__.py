"""Source methods: ``source.kind: erm`` is the module ``erm``, and ``rise`` is a folder.

``rise`` keeps its settings apart from its loss terms.
"""
