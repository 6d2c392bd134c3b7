"""Work that outlives a request: files, and batches of requests over them. Durable in the accounts database, so that any
gateway of it can go on where another one stopped.
"""
