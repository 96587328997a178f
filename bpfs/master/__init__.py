"""bpmaster: the composition root of the master and what only it needs."""
