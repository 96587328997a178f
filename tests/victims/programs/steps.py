"""Multiplies matrices on OpenBLAS's threads until argv[1] appears or argv[2] steps are done; prints steps and digest.

All entries are whole numbers below 2**53: the result does not depend on the order of the additions.
"""

import hashlib
import os
import sys

import numpy

size, prime = 384, 1009
entries = numpy.arange(size * size, dtype=float).reshape(size, size)
matrix, factor = entries % prime, entries * 7 % prime
limit = int(sys.argv[2]) if len(sys.argv) > 2 else 0
steps = 0
while steps != limit if limit else not os.path.exists(sys.argv[1]):
    matrix = (matrix @ factor + steps) % prime
    steps += 1
    if steps == 3:
        open(sys.argv[1] + ".ready", "w").close()
print(steps, hashlib.sha256(matrix.tobytes()).hexdigest(), len(os.listdir("/proc/self/task")) > 1)
