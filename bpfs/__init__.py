"""bpfs: a cluster with the look of one machine, driven through files under /bpfs."""

__version__ = "0.1.0"
