"""How a volume file is read: bytes, header, intensities, geometry, each checked before use."""
