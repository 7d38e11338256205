"""Volumes: reading, preprocessing, the store, and the loader of training patches."""
