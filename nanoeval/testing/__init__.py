"""For tests of evals without a live model: a real HTTP server whose replies are scripted."""

from nanoeval.testing._faults import Fault
from nanoeval.testing._process import ScriptedServerProcess
from nanoeval.testing._script import Reply, Request
from nanoeval.testing._server import ScriptedServer, ServerStats

__all__ = ["Fault", "Reply", "Request", "ScriptedServer", "ScriptedServerProcess", "ServerStats"]
