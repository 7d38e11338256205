"""Training: one loop, and a run around it that survives what happens to long runs.

`loop.fit` is the loop, `run.run_task` the run: folder, checkpoints, logs, validation. What is
trained is a `run.Task`, a bundle of functions; nothing here knows of masks or labels.
"""
