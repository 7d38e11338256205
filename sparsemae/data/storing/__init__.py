"""How a store is kept: its index, its files, and the checksums of both."""
