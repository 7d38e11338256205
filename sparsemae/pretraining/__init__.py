"""Masked-autoencoder pre-training: its configuration, and what it hands to the training loop."""
