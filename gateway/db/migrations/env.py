"""Alembic's entry: runs the steps on the connection that ``gateway.db.migrate`` hands over, in its transaction."""

from alembic import context

from gateway.db.models import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
