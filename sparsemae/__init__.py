"""Block-sparse masked-autoencoder pre-training of 3D CNNs for medical images."""

__version__ = "0.1.0"
