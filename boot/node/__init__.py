"""What runs on a node that boots: find drivers and network, find the server, fetch, switch kernels, become bpslave.

Only the standard library, and of that little: all of it travels to every node.
"""
