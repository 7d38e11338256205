"""From networks to label maps on a file's own grid, in memory that does not grow with a scan."""
