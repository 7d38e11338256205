"""How volumes are found: the layouts a source may have, and the ids of what is in it."""
