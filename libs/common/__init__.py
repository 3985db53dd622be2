"""What the services share: messages, subjects, errors, the bus, time, settings, logs and metrics."""

VERSION = "0.1.0"
