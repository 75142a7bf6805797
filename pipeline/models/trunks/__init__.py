"""The trunks, a file each."""
