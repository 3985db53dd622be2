"""Images of the services, and what the compose file mounts into them."""
