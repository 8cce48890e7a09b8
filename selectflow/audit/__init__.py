"""How far influence can be trusted: measured against really training without an example."""

from selectflow.audit.influence import influence, leave_one_out
from selectflow.offline.record import record

__all__ = ["influence", "leave_one_out", "record"]
