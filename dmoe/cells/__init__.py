"""Cells: processes in which strangers' shards run, without network, files, keys or other descriptors.

- walls: ``kernel`` the system calls, ``landlock``, ``seccomp`` the two filters, ``sandbox`` all of them in order
- inside: ``program`` what a cell runs; it gets weights as open files, and calls through ``lanes`` of shared memory
- outside: ``cell`` a cell's life (deadlines, restarts), ``link`` one process of it, ``content`` what that is given;
  ``shard`` and ``stage`` what a worker and a stage host see of it; ``cells`` which shards go where, and what is told
  about it; ``trial`` one for the doctor
"""
