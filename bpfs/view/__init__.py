"""The nodes' view of the master's files: server, object store, and the daemon that speaks FUSE."""
