"""Cells: processes in which strangers' shards run, without network, files, keys or other descriptors.

- walls: ``kernel`` the system calls, ``apart`` namespaces, ``landlock``, ``seccomp`` the two filters, ``cgroups``,
  ``gvisor`` from outside, ``sandbox`` all of them in order; ``launch`` starts every kind of walled process, ``frames``
  messages with those that are no cells (text, grammars, imports)
- inside: ``program`` what a cell runs; it gets weights as open files, and calls through ``lanes`` of shared memory
- outside: ``cell`` a cell's life (deadlines, restarts), ``link`` one process of it, ``content`` what that is given;
  ``shard`` and ``stage`` what a worker and a stage host see of it; ``cells`` which shards go where, and what is told
  about it; ``trial`` one of each kind for the doctor
- a model that the node itself answers with: ``home`` outside, ``homeprogram`` inside
"""
