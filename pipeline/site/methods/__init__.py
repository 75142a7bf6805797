"""Site methods: ``site.kind: tent`` is the module ``tent``, and ``danet`` is a folder.

``danet`` keeps its settings apart from its algorithm.
"""
