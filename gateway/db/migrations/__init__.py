"""Alembic's environment and the schema's history, run by ``gateway.db.migrate``."""
