"""A page to look at: what an evaluation or a run left in its directory, as one html file that needs nothing else."""
