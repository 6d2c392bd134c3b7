"""RiOS's own resources over HTTP. Each file holds the endpoints of one resource and their handlers."""
