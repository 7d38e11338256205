"""How a store is made: jobs, workers, journals and the commit at the end."""
