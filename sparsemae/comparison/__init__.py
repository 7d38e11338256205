"""Methods compared over data sets: the suite, its jobs, their scores, statistics and pages."""
