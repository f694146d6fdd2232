"""Alembic's migrations. A new one gets the next number, and `migrate.HEAD` with it."""
