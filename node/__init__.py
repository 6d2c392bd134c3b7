"""The composition root: settings, life cycle, control socket, metrics and the command line."""
