"""Who deployed what through the gateway. What is deployed, and how far it is, the node itself knows."""

import sqlalchemy as sa

from gateway.db.models import metadata

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("model_id", sa.String(64), primary_key=True),
    sa.Column("user_id", sa.String(64), sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
)
"""``created_at_ms``: of the deployment's last change through the gateway, as the node tells it; one of another time is
not this one."""
