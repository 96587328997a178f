"""What a node image has in the place of large modules of the standard library that nothing on a node uses."""
