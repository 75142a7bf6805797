"""Source methods: ``source.kind: erm`` is the module ``erm``.

``rise`` is a folder, its settings apart from its loss terms.
"""
