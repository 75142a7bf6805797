"""Site methods: ``site.kind: tent`` is the module ``tent``.

``danet`` is a folder, its settings apart from its algorithm.
"""
