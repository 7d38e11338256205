"""Three numbers, one for each axis of a volume, in the order of its array."""

Triple = tuple[int, int, int]
FloatTriple = tuple[float, float, float]
