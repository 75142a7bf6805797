"""Source methods, one file each: `source.kind: rise` is the module `rise`."""
