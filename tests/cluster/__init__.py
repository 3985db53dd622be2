"""The system on several machines: network namespaces that stand for them, with a switch between."""
