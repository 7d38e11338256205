"""Volumes: from files to a store, and from a store to training patches.

The modules here are the doors: `sources` finds volumes, `read` reads one, `transforms` prepares it,
`preprocess` does that for all of them and makes a `store`, `loader` draws patches from it, `report`
shows it. The folders beside them hold how each does it.
"""
