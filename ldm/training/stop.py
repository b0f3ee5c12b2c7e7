"""TODO."""

import signal

STOPPED_FILE = "stopped"  # file of a run that a signal ended, for schedulers: launchers change the exit code
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
