"""Fine-tuning a network for segmentation: configuration, loss, and the task for the trainer."""
