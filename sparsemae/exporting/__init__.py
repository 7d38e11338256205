"""The forms in which weights leave: nnU-Net's, nnssl's, and safetensors with our own names."""
