"""Names of the files in a run folder, for who writes and who reads them."""

CONFIG = "config.toml"  # resolved: it rebuilds the run
PLAN = "plan.json"  # of a fine-tuning run: its voxels, patches and network
TASK = "task.json"  # of a fine-tuning run: its data set and cases, and what it began with
STORE = "store"  # of a fine-tuning run: its prepared cases, unless they are kept elsewhere
STATUS = "status.json"  # where the run stands, for people and scripts
LOCK = ".lock"  # held by the process that trains
METRICS = "metrics.jsonl"  # what steps computed: the same bytes whatever interrupted the run
TIMING = "timing.jsonl"  # how long they took
HISTORY = "history.jsonl"  # starts, resumes, stops, warnings; append only
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
PREVIEW, PICTURE = "preview.npz", "preview.png"
REPORT = "report.html"
