"""Stages: whole layers at a host, with their key/value caches there.

``host`` serves the stages loaded in this node, ``caller`` runs sequences over stages wherever their replicas are:
``legs`` are their tickets, ``passes`` the rows' ways.
"""
