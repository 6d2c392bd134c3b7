"""Cells: processes in which strangers' shards run, without network, files, keys or other descriptors.

- walls: ``kernel`` the system calls, ``landlock``, ``seccomp`` the two filters, ``sandbox`` all of them in order
- inside: ``program`` what a cell runs; it gets weights as open files, and calls through ``lanes`` of shared memory
- outside: ``cell`` a cell's life (start, calls, deadline, restart), ``shard`` what a worker sees of it, ``cells`` which
  shards go where, and what is told about it
"""
