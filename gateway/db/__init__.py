"""The accounts database: tables, connections, migrations. One schema for SQLite and PostgreSQL."""
