"""Dump a running process into an image and rebuild it elsewhere, on an unmodified Linux kernel.

The package is synchronous and imports neither trio, pyfuse3 nor bpfs. ptrace belongs to one thread:
whoever seizes a process must do everything else to it from the same thread (the worker's main thread).
"""
