"""Site methods, one file each: `site.kind: danet` is the module `danet`."""
