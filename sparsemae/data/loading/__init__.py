"""How batches come about: order, crops, worker processes and the training device."""
