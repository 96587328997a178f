"""Starting real nodes: images, network boot, the first program of a node."""
