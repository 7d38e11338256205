"""Labelled data sets: reading them, preparing them, and drawing training patches from them."""
