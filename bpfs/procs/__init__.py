"""The processes of the cluster: where each of them is, its migrations, its ghost."""
