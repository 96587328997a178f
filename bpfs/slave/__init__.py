"""bpslave: the composition root of a node and what only it needs."""
